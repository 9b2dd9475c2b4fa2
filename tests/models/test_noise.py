"""Noise on the reference: against losses worked by hand, and never where it is not meant to be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models import noise, trainers
from models.jobs import PreferenceJob
from models.specs import LearnedScale, LoRA, Preference, ReferenceNoise
from tests.models.test_trainers import ADAPTER, MERGED, SUMS, figures, preference_job, seen, start, weights_of

__all__ = ["preference_job", "seen", "start"]  # fixtures

needs_torch = pytest.mark.vllm


@pytest.mark.parametrize(
    ("below", "margin", "expected"),
    [
        pytest.param(None, None, True, id="all pairs"),
        pytest.param(0.2, 0.1, True, id="close"),
        pytest.param(0.2, -0.1, True, id="close, the other way"),
        pytest.param(0.2, 0.2, False, id="not closer"),
        pytest.param(0.2, None, False, id="undecided"),
    ],
)
def test_noise_is_for_all_pairs_or_for_those_a_judge_finds_close(
    below: float | None, margin: float | None, *, expected: bool
) -> None:
    assert noise.is_noisy(ReferenceNoise(below_margin=below), margin) is expected


def test_a_scale_that_could_not_start_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"scale is 2.0 and learned.bound 1.0"):
        ReferenceNoise(scale=2.0, learned=LearnedScale(bound=1.0))


def test_embedding_noise_that_would_reach_the_reference_is_refused() -> None:
    with pytest.raises(ValidationError, match="set precompute_reference: true"):
        Preference(embedding_noise=5, lora=LoRA(), precompute_reference=False)
    Preference(embedding_noise=5, lora=LoRA())
    Preference(embedding_noise=5, precompute_reference=False)  # a frozen copy is never noised


@needs_torch
def test_the_noised_log_probs_and_their_loss_are_those_worked_by_hand() -> None:
    import torch

    # Two tokens in the vocabulary, logits 0 and 0, standard deviation 2, draws 0.5 and -0.5: they become 1 and -1.
    # log p(0) = -ln(1 + e^-2) = -0.126928; log p(1) = -2.126928.
    logits, normal = torch.zeros(1, 2, 2), torch.tensor([[[0.5, -0.5], [0.5, -0.5]]])
    told = noise.noised_log_probs(logits, torch.tensor([[0, 1]]), 2.0, normal)
    assert told.tolist() == [[pytest.approx(-0.126928, abs=1e-6), pytest.approx(-2.126928, abs=1e-6)]]
    # A policy that is the clean reference gives the rejected side 2 ln 0.5 = -1.386294 where the noised reference gives
    # -2.253856. The chosen side is clean: its ratio is 0, the rejected one's 0.867562. With beta 1 the loss is
    # ln(1 + 2.381099) = 1.218201, and not ln 2.
    ratio = 2 * math.log(0.5) - told.sum().item()
    assert -math.log(1 / (1 + math.exp(ratio))) == pytest.approx(1.218201, abs=1e-5)


@needs_torch
def test_a_learned_scale_starts_as_told_is_bounded_and_gets_the_gradient_turned_round() -> None:
    import torch

    settings = ReferenceNoise(scale=0.25, learned=LearnedScale(bound=0.5))
    scale = noise.scale_class()(settings, 3, 4)
    first, variance = scale(torch.randn(2, 3))
    assert first.detach().numpy() == pytest.approx(0.25)
    assert variance.detach().numpy() == pytest.approx(0.0625)
    first.sum().backward()
    # d scale / d bias = bound * s * (1 - s) = 0.5 * 0.25 = 0.125 for each of two rows, and turned round
    assert scale.linear.bias.grad.tolist() == pytest.approx([-0.25] * 4)
    scale.linear.bias.grad = None
    scale(torch.randn(2, 3))[1].sum().backward()
    # d variance / d bias = 2 * 0.25 * 0.125 = 0.0625 for each of two rows, not turned round
    assert scale.linear.bias.grad.tolist() == pytest.approx([0.125] * 4)
    with torch.no_grad():
        scale.linear.bias.fill_(50.0)
    assert float(scale(torch.randn(1, 3))[0].detach().max()) <= 0.5


def first_loss(job: PreferenceJob) -> float:
    return figures(job, "loss")[1]


@needs_torch
@pytest.mark.parametrize("lora", [None, MERGED, ADAPTER], ids=["full", "merged adapter", "adapter"])
def test_only_marked_pairs_are_noised_and_the_reference_stays_as_it_was(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], monkeypatch: pytest.MonkeyPatch, lora: LoRA | None
) -> None:
    import torch

    settings = {"lora": lora, "max_steps": 3, "reference_noise": ReferenceNoise(scale=2.0)}
    noised = preference_job("noised", **settings)
    trainers.fit_preferences(noised)
    assert first_loss(noised) > math.log(2) + 1e-3  # the rejected side is likelier under the policy than under noise
    if (reference := seen[0].ref_model) is not None:
        before = weights_of(noised.weights)
        assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
        assert not reference.training
    monkeypatch.setattr(trainers, "is_noisy", lambda *_: False)
    unmarked = preference_job("unmarked", **settings)
    trainers.fit_preferences(unmarked)
    assert first_loss(unmarked) == pytest.approx(math.log(2), abs=1e-6)


@needs_torch
def test_the_first_loss_under_noise_is_the_one_figured_from_the_model_itself(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(torch, "randn_like", lambda like: like.new_tensor(1.0).expand_as(like) * (like > like.mean()))
    job = preference_job(max_steps=1, global_batch_size=len(SUMS), beta=0.5, reference_noise=ReferenceNoise(scale=0.7))
    trainers.fit_preferences(job)
    model, losses = AutoModelForCausalLM.from_pretrained(job.weights), []
    for row in seen[0].train_dataset:
        prompt, rejected = row["prompt_ids"], row["rejected_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rejected])).logits[0, len(prompt) - 1 : -1]
        losses.append((logits, torch.tensor(rejected)))
    # The draws of the whole padded batch compare with its mean; figure it from the batch as the trainer made it.
    batch = seen[0].data_collator([seen[0].train_dataset[n] for n in range(len(SUMS))])
    half = len(SUMS)
    with torch.no_grad():
        all_logits = model(batch["input_ids"][half:], attention_mask=batch["attention_mask"][half:]).logits[:, :-1]
    mean = all_logits.mean()
    expected = []
    for logits, targets in losses:
        clean = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        noised = (logits + 0.7 * (logits > mean)).log_softmax(-1).gather(1, targets[:, None]).sum()
        expected.append(math.log(1 + math.exp(0.5 * float(clean - noised))))  # -log sigmoid(0 - 0.5 * ratio)
    assert first_loss(job) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@needs_torch
def test_a_learned_scale_moves_is_logged_and_survives_a_kill(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = ReferenceNoise(scale=0.3, learned=LearnedScale(bound=1.0, penalty=0.0, learning_rate=0.05))
    settings: dict[str, Any] = {"reference_noise": learned, "epochs": 2, "save_steps": 2}

    def die_at_five(line: str, *_: Any) -> None:
        if line.startswith("optimizer step 5"):
            raise RuntimeError("killed")

    whole = preference_job("whole", **settings)
    trainers.fit_preferences(whole)
    scales = figures(whole, "reference_noise/scale")
    assert scales[1] == pytest.approx(0.3, abs=1e-6)
    assert scales[6] > 0.3  # it learns to shrink the margin, and nothing holds it back
    resumed = preference_job("resumed", **settings)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(trainers.logger, "info", die_at_five)
        trainers.fit_preferences(resumed)
    trainers.fit_preferences(resumed)
    assert figures(resumed, "reference_noise/scale") == scales  # its gradients too start from nothing at each step
    assert (resumed.output / "model.safetensors").read_bytes() == (whole.output / "model.safetensors").read_bytes()
    assert sorted(path.name for path in whole.output.iterdir() if "noise" in path.name) == []


@needs_torch
def test_a_penalty_holds_the_learned_scale_back(preference_job: Callable[..., PreferenceJob]) -> None:
    def last_scale(name: str, penalty: float) -> float:
        learned = LearnedScale(bound=1.0, penalty=penalty, learning_rate=0.05)
        job = preference_job(name, reference_noise=ReferenceNoise(scale=0.3, learned=learned), epochs=2)
        trainers.fit_preferences(job)
        return figures(job, "reference_noise/scale")[6]

    assert last_scale("held", 1000.0) < 0.3 < last_scale("free", 0.0)


@needs_torch
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"precompute_reference": True}, id="precomputed reference"),
        pytest.param({"precompute_reference": False}, id="frozen copy"),
        pytest.param({"precompute_reference": True, "lora": MERGED}, id="precomputed, adapter off"),
    ],
)
def test_embedding_noise_reaches_the_policy_and_not_the_reference(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], settings: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    job = preference_job(embedding_noise=50.0, max_steps=1, **settings)
    taken: list[tuple[Any, Any]] = []
    trainers.fit_preferences(job)
    clean = preference_job("clean", max_steps=1, **settings)
    trainers.fit_preferences(clean)
    # Step 0 of a clean run is ln 2 exactly; a noisy policy against a clean reference is not.
    assert first_loss(clean) == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first_loss(job) - math.log(2)) > 1e-3
    noisy, model = seen[0], AutoModelForCausalLM.from_pretrained(job.weights)
    for row in list(noisy.train_dataset)[:3]:
        for side in ("chosen", "rejected"):
            ids, first = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
            taken.append((float(log_probs.gather(1, torch.tensor(ids[first:])[:, None]).sum()), (row, side)))
    if settings["precompute_reference"]:
        assert [row[f"ref_{side}_logps"] for _, (row, side) in taken] == [
            pytest.approx(clean_one, rel=1e-4) for clean_one, _ in taken
        ]
    else:
        batch = noisy.data_collator(list(noisy.train_dataset)[:3])
        chosen, rejected = noisy.compute_ref_log_probs(noisy.ref_model, batch)
        told = [float(one) for pair in zip(chosen, rejected, strict=True) for one in pair]
        assert told == [pytest.approx(clean_one, rel=1e-4) for clean_one, _ in taken]


@needs_torch
def test_rmsprop_is_the_optimizer_that_was_asked_for(
    preference_job: Callable[..., PreferenceJob], seen: list[Any]
) -> None:
    trainers.fit_preferences(preference_job(optimizer="rmsprop", max_steps=1, learning_rate=1e-4))
    optimizer = seen[0].optimizer
    assert type(getattr(optimizer, "optimizer", optimizer)).__name__ == "RMSprop"


@needs_torch
def test_the_margin_column_decides_which_pairs_are_noised(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    job = preference_job(max_steps=1, reference_noise=ReferenceNoise(below_margin=0.2))
    table = pq.read_table(job.rows[0])
    margins = [0.1, -0.5, None] * (len(SUMS) // 3)
    pq.write_table(table.append_column("margin", pa.array(margins, pa.float64())), tmp_path / "judged.parquet")
    trainers.fit_preferences(job.model_copy(update={"rows": (tmp_path / "judged.parquet",)}))
    assert list(seen[0].train_dataset["noisy"]) == [True, False, False] * (len(SUMS) // 3)


@needs_torch
def test_embedding_noise_is_off_while_the_reference_is_asked_beside_reference_noise(
    preference_job: Callable[..., PreferenceJob], seen: list[Any]
) -> None:
    import torch
    from transformers.integrations.neftune import activate_neftune

    both = {"embedding_noise": 50.0, "reference_noise": ReferenceNoise(), "precompute_reference": False}
    trainers.fit_preferences(preference_job(lora=MERGED, max_steps=1, **both))
    trainer = seen[0]
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    marks = torch.zeros_like(batch.pop("noisy"))
    clean = trainer._reference(batch, marks)[:2]
    activate_neftune(trainer.model, 50.0)  # the training took it off when it ended
    trainer.model.train()
    noisy = trainer._reference(batch, marks)[:2]
    assert all(torch.equal(one, other) for one, other in zip(clean, noisy, strict=True))
    assert trainer.model.training
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    policy = trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    assert not torch.allclose(policy.log_probs.sum(1)[:4], clean[0], atol=0.1)  # the policy is noised all the same
