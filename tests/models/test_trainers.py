import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from models import trainers, training_callbacks, worker
from models.jobs import PreferenceJob, SFTJob, TinyJob, TrainingJob, TrainingOutcome
from models.specs import SFT, LoRA, Preference, TinyModel

SUMS = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}\nFINAL ANSWER: {a + b}") for a in range(6) for b in range(4)]
SMALL = TinyModel(hidden_size=32, layers=1, vocabulary=480, context=64)
ADAPTER = LoRA(rank=4, alpha=8, dropout=0.0, merge=False)
MERGED = ADAPTER.model_copy(update={"merge": True})

needs_torch = pytest.mark.vllm


def write_rows(file: Path, **columns: list[str]) -> tuple[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file)
    return (file,)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained tiny model."""
    import torch

    from models.tiny import save_untrained

    torch.set_num_threads(1)  # the order of a sum decides its last bits
    folder = tmp_path_factory.mktemp("start")
    save_untrained(SMALL, ["\n".join(row) for row in SUMS], folder)
    return str(folder)


@pytest.fixture
def sft_job(start: str, tmp_path: Path) -> Callable[..., SFTJob]:
    rows = write_rows(tmp_path / "sft.parquet", prompt=[p for p, _ in SUMS], completion=[c for _, c in SUMS])

    def job(name: str = "a", weights: str = start, **settings: Any) -> SFTJob:
        chosen: dict[str, Any] = {"learning_rate": 1e-2, "global_batch_size": 4, "max_length": 64, **settings}
        folders: dict[str, Any] = {"output": tmp_path / name, "checkpoints": tmp_path / f"{name}-checkpoints"}
        return SFTJob(weights=weights, rows=rows, settings=SFT(**chosen), metrics=tmp_path / f"{name}.jsonl", **folders)

    return job


@pytest.fixture
def preference_job(start: str, tmp_path: Path) -> Callable[..., PreferenceJob]:
    rows = write_rows(
        tmp_path / "pairs.parquet",
        prompt=[p for p, _ in SUMS],
        chosen=[c for _, c in SUMS],
        rejected=[f"{c}0" for _, c in SUMS],
    )

    def job(name: str = "p", adapter: Path | None = None, **settings: Any) -> PreferenceJob:
        chosen: dict[str, Any] = {"learning_rate": 1e-2, "global_batch_size": 8, "max_length": 64, **settings}
        folders: dict[str, Any] = {"output": tmp_path / name, "checkpoints": tmp_path / f"{name}-checkpoints"}
        return PreferenceJob(
            weights=start,
            adapter=adapter,
            rows=rows,
            settings=Preference(**chosen),
            metrics=tmp_path / f"{name}.jsonl",
            **folders,
        )

    return job


def figures(job: SFTJob | PreferenceJob, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    return {row["optimizer_step"]: row["value"] for row in rows if row["name"] == name}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights_of(folder: Path | str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(Path(folder) / "model.safetensors"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The TRL trainers that were used."""
    used: list[Any] = []
    train = trainers._train

    def spy(trainer: Any, *arguments: Any) -> TrainingOutcome:
        used.append(trainer)
        return train(trainer, *arguments)

    monkeypatch.setattr(trainers, "_train", spy)
    return used


def test_a_job_survives_its_journey_as_json() -> None:
    folders = {"rows": (Path("r"),), "output": Path("o"), "checkpoints": Path("c"), "metrics": Path("m")}
    jobs = [
        SFTJob(weights="w", settings=SFT(lora=ADAPTER), **folders),  # type: ignore[arg-type] # a dict of all kinds
        PreferenceJob(weights="w", settings=Preference(), adapter=Path("a"), **folders),  # type: ignore[arg-type]
        TinyJob(settings=TinyModel(), **folders),  # type: ignore[arg-type]
    ]
    read = TypeAdapter[Any](TrainingJob).validate_json
    assert [read(job.model_dump_json()) for job in jobs] == jobs


@pytest.mark.parametrize(
    ("settings", "rows", "devices", "expected"),
    [
        pytest.param({"global_batch_size": 16}, 340, 1, (16, 1, 22), id="one device takes it whole"),  # 21.25 batches
        pytest.param({"global_batch_size": 16}, 340, 4, (4, 1, 22), id="split over devices"),
        pytest.param({"global_batch_size": 16, "per_device_batch_size": 2}, 340, 2, (2, 4, 22), id="accumulated"),
        pytest.param({"global_batch_size": 16, "epochs": 1.5}, 320, 1, (16, 1, 30), id="half an epoch more"),
        pytest.param({"global_batch_size": 16, "max_steps": 7}, 340, 1, (16, 1, 7), id="steps win over epochs"),
    ],
)
def test_accumulation_is_derived_from_the_global_batch(
    settings: dict[str, Any], rows: int, devices: int, expected: tuple[int, int, int]
) -> None:
    assert trainers.split_batch(SFT(**settings), rows, devices) == expected


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 devices x 5 rows .* take 15 at once"):
        trainers.split_batch(SFT(global_batch_size=16), 100, devices=3)


def test_schedules_are_in_optimizer_steps() -> None:
    schedule = trainers._schedule(SFT(schedule="trapezoid", warmup_ratio=0.05, decay_ratio=0.4), 2_000)
    assert schedule["warmup_steps"] == 100
    assert schedule["lr_scheduler_kwargs"] == {"num_decay_steps": 800, "decay_type": "linear"}
    assert trainers._schedule(SFT(schedule="cosine"), 20)["warmup_steps"] == 1


def seal(checkpoint: Path, belongs_to: dict[str, Any]) -> None:
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"1234")
    (checkpoint / "whole.json").write_text(json.dumps({"belongs_to": belongs_to, "files": {"optimizer.pt": 4}}))


def test_torn_and_foreign_checkpoints_are_passed_over(tmp_path: Path) -> None:
    mine = {"settings": {"betas": (0.9,)}}
    for step in (2, 4, 10, 12):
        seal(tmp_path / f"checkpoint-{step}", {"settings": "other"} if step == 10 else mine)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_bytes(b"12")
    (tmp_path / "checkpoint-14").mkdir()
    assert training_callbacks.last_whole_checkpoint(tmp_path, mine) == tmp_path / "checkpoint-4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("report", "status", "error", "message"),
    [
        pytest.param(None, -9, worker.TrainingConfigurationError, "lower per_device_batch_size", id="killed"),
        pytest.param(
            {"failure": "memory", "message": "m"},
            1,
            worker.TrainingConfigurationError,
            "lower per_device_batch_size",
            id="out of memory",
        ),
        pytest.param(
            {"failure": "configuration", "message": "no row is left"},
            1,
            worker.TrainingConfigurationError,
            "no row is left",
            id="bad settings",
        ),
        pytest.param(None, 1, worker.TrainingError, "last words", id="died without a word"),
        pytest.param(None, 0, worker.TrainingError, "last words", id="left without a word"),
    ],
)
def test_a_failing_child_is_reported(
    tmp_path: Path, report: dict[str, str] | None, status: int, error: type[Exception], message: str
) -> None:
    file = tmp_path / "outcome.json"
    if report:
        file.write_text(json.dumps(report))
    job = TinyJob(rows=(file,), settings=TinyModel(), output=file, checkpoints=file, metrics=file)
    with pytest.raises(error, match=message) as raised:
        worker._read_outcome(job, file, status, "last words")
    assert type(raised.value) is error


def test_a_missing_accelerate_config_is_an_error_before_anything_starts() -> None:
    with pytest.raises(worker.TrainingConfigurationError, match="accelerate config"):
        worker._launcher(SFT(accelerate_config="nowhere.yaml"))


@needs_torch
def test_rows_are_prompt_and_completion_as_sampled_and_only_the_completion_is_trained(
    sft_job: Callable[..., SFTJob], seen: list[Any]
) -> None:
    from models.chat import load_tokenizer

    job = sft_job(max_steps=1)
    tokenizer = load_tokenizer(job.weights, None, False)
    trainers.fit_sft(job)
    row = seen[0].train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(row["input_ids"]) == "Instruct: What is 0 + 0?\nOutput:\n" + tokenizer.decode(trained)
    assert tokenizer.decode(trained) == "0 + 0 = 0\nFINAL ANSWER: 0<|endoftext|>"
    batch = next(iter(seen[0].get_train_dataloader()))
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 4  # every row's end is trained, no padding is


@needs_torch
def test_dpo_trains_on_the_ids_we_rendered(preference_job: Callable[..., PreferenceJob], seen: list[Any]) -> None:
    from models.chat import load_tokenizer, messages_of, render_completion, render_prompt

    job = preference_job(max_steps=1, precompute_reference=False)
    tokenizer = load_tokenizer(job.weights, None, False)
    trainers.fit_preferences(job)
    messages = messages_of(job.template, SUMS[5][0])
    assert seen[0].train_dataset[5] == {
        "prompt_ids": render_prompt(tokenizer, messages),
        "chosen_ids": render_completion(tokenizer, messages, SUMS[5][1]),
        "rejected_ids": render_completion(tokenizer, messages, f"{SUMS[5][1]}0"),
    }


@needs_torch
def test_long_rows_are_dropped_and_counted_and_none_left_is_an_error(sft_job: Callable[..., SFTJob]) -> None:
    from models.chat import load_tokenizer

    job = sft_job()
    tokenizer = load_tokenizer(job.weights, None, False)
    lengths = [len(row["input_ids"]) for row in trainers.sft_rows(job, tokenizer)[0]]
    write_rows(job.rows[0], prompt=["a", "b " * 40], completion=["c", "d"])
    kept, dropped = trainers.sft_rows(sft_job(max_length=max(lengths)), tokenizer)
    assert (len(kept), dropped) == (1, {"longer than max_length": 1})
    with pytest.raises(ValueError, match=r"no row of .*longer than max_length: 2.*raise max_length"):
        trainers.fit_sft(sft_job(max_length=8))


@needs_torch
def test_the_same_seed_gives_the_same_bytes_and_nothing_but_a_model(sft_job: Callable[..., SFTJob]) -> None:
    outcome = trainers.fit_sft(sft_job("a"))
    trainers.fit_sft(sft_job("b"))
    trainers.fit_sft(sft_job("c", seed=7))
    first, second, other = (contents(sft_job(name).output) for name in ("a", "b", "c"))
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]
    assert sorted(first) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (outcome.rows, outcome.optimizer_steps, outcome.dropped) == (24, 6, {})
    losses = figures(sft_job("a"), "loss")
    assert losses[6] < losses[1]
    assert figures(sft_job("a"), "num_tokens")[6] == outcome.tokens


@needs_torch
def test_an_adapter_is_the_same_in_every_process(sft_job: Callable[..., SFTJob]) -> None:
    lines: list[str] = []
    for name in ("a", "b"):  # sets are ordered by hashes, which differ between processes
        worker.run_job(sft_job(name, lora=ADAPTER, max_steps=2), lines.append)
    assert contents(sft_job("a").output) == contents(sft_job("b").output)
    assert any("optimizer step 2 of 2" in line for line in lines)


@needs_torch
def test_a_child_that_waited_trains_what_a_new_one_trains(sft_job: Callable[..., SFTJob]) -> None:
    lines: list[str] = []
    worker.run_job(sft_job("a", max_steps=2), lines.append)
    worker.get_ready(sft_job("a", max_steps=2))
    child = worker._waiting[0].child
    worker.run_job(sft_job("b", max_steps=2, learning_rate=1e-2), lines.append)
    assert (child.process.returncode, worker._waiting) == (0, [])
    assert contents(sft_job("a").output) == contents(sft_job("b").output)
    assert len([line for line in lines if "optimizer step 2 of 2" in line]) == 2


@pytest.mark.parametrize("how", ["other threads", "killed", "no longer wanted"])
def test_a_child_that_waited_in_vain_is_ended_and_not_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(threads: int) -> TinyJob:
        tiny = TinyModel()
        tiny = tiny.model_copy(update={"training": tiny.training.model_copy(update={"threads": threads})})
        return TinyJob(rows=(tmp_path,), settings=tiny, output=tmp_path, checkpoints=tmp_path, metrics=tmp_path)

    worker.get_ready(job(threads=1))
    child = worker._waiting[0].child
    if how == "no longer wanted":
        worker.end_waiting()
    else:
        monkeypatch.setattr(worker, "Child", lambda *_, **named: named["environment"]["OMP_NUM_THREADS"])
        if how == "killed":
            child.kill()
        threads = 1 if how == "killed" else 2
        new: object = worker._child(job(threads), tmp_path, lambda line: None)
        assert new == str(threads)
    assert (child.process.returncode, worker._waiting) == (-9, [])


@needs_torch
def test_a_killed_training_goes_on_from_the_last_whole_checkpoint(
    sft_job: Callable[..., SFTJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_at_five(line: str, *_: Any) -> None:
        if line.startswith("optimizer step 5"):
            raise RuntimeError("killed")

    whole = trainers.fit_sft(sft_job("whole", save_steps=2))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(trainers.logger, "info", die_at_five)
        trainers.fit_sft(sft_job("resumed", save_steps=2))
    torn = sft_job("resumed").checkpoints / "checkpoint-4" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    resumed = trainers.fit_sft(sft_job("resumed", save_steps=2))
    assert contents(sft_job("resumed").output) == contents(sft_job("whole").output)
    assert figures(sft_job("resumed"), "loss") == figures(sft_job("whole"), "loss")
    assert resumed.tokens == whole.tokens
    again = trainers.fit_sft(sft_job("resumed", save_steps=2))  # all steps are done, only saving is left
    assert again.optimizer_steps == 6


@needs_torch
def test_accumulation_reaches_the_same_weights(sft_job: Callable[..., SFTJob]) -> None:
    import torch

    trainers.fit_sft(sft_job("at-once"))
    trainers.fit_sft(sft_job("bit-by-bit", per_device_batch_size=1))
    at_once, bit_by_bit = (weights_of(sft_job(name).output) for name in ("at-once", "bit-by-bit"))
    for name in at_once:
        torch.testing.assert_close(at_once[name], bit_by_bit[name], atol=2e-3, rtol=0)


@needs_torch
def test_scoring_completions_only_leaves_the_loss_as_it_is(
    sft_job: Callable[..., SFTJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.fit_sft(sft_job("ours", max_steps=2))
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: False)
    monkeypatch.setattr(trainers, "_score_completions_only", lambda: None)
    trainers.fit_sft(sft_job("theirs", max_steps=2))
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert figures(sft_job("ours"), name) == pytest.approx(figures(sft_job("theirs"), name), rel=1e-4)


@needs_torch
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"precompute_reference": True}, id="precomputed reference"),
        pytest.param({"precompute_reference": False}, id="frozen copy"),
        pytest.param({"precompute_reference": False, "lora": ADAPTER}, id="adapter switched off"),
    ],
)
def test_dpo_starts_at_ln_2_falls_and_leaves_the_reference_alone(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], settings: dict[str, Any]
) -> None:
    import torch

    job = preference_job(epochs=5, learning_rate=3e-2, schedule="constant", **settings)
    outcome = trainers.fit_preferences(job)
    losses = figures(job, "loss")
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[outcome.optimizer_steps] < losses[1] - 0.05
    assert figures(job, "rewards/margins")[outcome.optimizer_steps] > 0
    reference = seen[0].ref_model
    assert (reference is None) == ("lora" in settings or settings["precompute_reference"])
    if reference is not None:
        start = weights_of(job.weights)
        assert all(torch.equal(value, start[name]) for name, value in reference.state_dict().items())


@needs_torch
@pytest.mark.parametrize("loss", ["sigmoid", "sft", "apo_zero", "apo_down", "robust", "hinge"])
def test_each_preference_loss_trains(preference_job: Callable[..., PreferenceJob], loss: str) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    job = preference_job(loss_type=(loss,), loss_weights=(1.0,), label_smoothing=smoothing, max_steps=2)
    assert trainers.fit_preferences(job).optimizer_steps == 2
    # At the start both sides have the reference's likelihood: sigmoid and robust ln 2, hinge 1, apo_zero 0.5 + 0.5, ...
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0}
    if loss in expected:
        assert figures(job, "loss")[1] == pytest.approx(expected[loss], abs=1e-5)


@needs_torch
def test_a_lora_is_merged_into_a_full_model(sft_job: Callable[..., SFTJob], start: str) -> None:
    import torch

    job = sft_job(lora=MERGED)
    trainers.fit_sft(job)
    before, after = weights_of(start), weights_of(job.output)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "dense"}
    assert not list(job.output.glob("adapter*"))
    trainers.fit_sft(sft_job("next", weights=str(job.output), max_steps=1))  # it loads like any model


@needs_torch
def test_an_adapter_trained_further_is_its_own_reference_and_stays_one_adapter(
    sft_job: Callable[..., SFTJob], preference_job: Callable[..., PreferenceJob]
) -> None:
    first = sft_job(lora=ADAPTER)
    trainers.fit_sft(first)
    job = preference_job(adapter=first.output, lora=ADAPTER)
    trainers.fit_preferences(job)
    assert figures(job, "loss")[1] == pytest.approx(math.log(2), abs=1e-6)
    assert sorted(contents(job.output)) == sorted(contents(first.output))
    merged = preference_job("merged", adapter=first.output, max_steps=1)
    trainers.fit_preferences(merged)  # a full fine-tune starts from the two together
    assert (merged.output / "model.safetensors").exists()


@needs_torch
def test_a_run_through_accelerate_launch_and_bad_rows_come_back_from_the_child(sft_job: Callable[..., SFTJob]) -> None:
    config = str(Path(__file__).parents[2] / "deployments/accelerate/cpu.yaml")
    outcome = worker.run_job(sft_job(max_steps=1, accelerate_config=config), lambda line: None)
    assert (outcome.optimizer_steps, outcome.rows) == (1, 24)
    with pytest.raises(worker.TrainingConfigurationError, match="raise max_length"):
        worker.run_job(sft_job("none-left", max_length=8), lambda line: None)


@needs_torch
def test_the_loss_of_each_task_on_rows_held_out_is_logged_before_and_after(
    sft_job: Callable[..., SFTJob], tmp_path: Path
) -> None:
    held_out = write_rows(
        tmp_path / "held_out.parquet",
        task=["solve", "solve", "judge"],
        prompt=["What is 1 + 2?", "What is 7 + 7?", "1 + 2 = 3"],
        completion=["1 + 2 = 3\nFINAL ANSWER: 3", "7 + 7 = 14\nFINAL ANSWER: 14", "Correct"],
    )
    job = sft_job(max_steps=20)
    trainers.fit_sft(job)
    with_rows = sft_job("b", max_steps=20).model_copy(update={"held_out": held_out})
    trainers.fit_sft(with_rows)
    assert not figures(job, "eval_loss/solve")
    for task in ("solve", "judge"):
        assert list(figures(with_rows, f"eval_loss/{task}")) == [0, 20]
    before, after = figures(with_rows, "eval_loss/solve").values()
    assert after < before
    assert figures(with_rows, "loss") == figures(job, "loss")  # a look at held-out rows changes no training


@needs_torch
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_two_processes_reach_the_weights_that_one_reaches(
    kind: str, sft_job: Callable[..., SFTJob], preference_job: Callable[..., PreferenceJob]
) -> None:
    job = sft_job if kind == "sft" else preference_job
    two = str(Path(__file__).parents[2] / "deployments/accelerate/cpu2.yaml")
    alone, together = job("alone", max_steps=3), job("together", max_steps=3, accelerate_config=two)
    first, second = (worker.run_job(one, lambda line: None) for one in (alone, together))
    assert (first.rows, first.optimizer_steps) == (second.rows, second.optimizer_steps)
    expected, reached = weights_of(alone.output), weights_of(together.output)
    assert expected.keys() == reached.keys()
    for name, weight in expected.items():
        assert (weight - reached[name]).abs().max() < 1e-4, name
    begun = weights_of(alone.weights)
    assert max((weight - expected[name]).abs().max() for name, weight in begun.items()) > 1e-3  # it did train
    assert contents(together.output).keys() == contents(alone.output).keys()


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "deployments/accelerate").glob("*.yaml")), ids=lambda file: file.stem
)
def test_accelerate_reads_the_configs_that_come_along(file: Path) -> None:
    accelerate_config = pytest.importorskip("accelerate.commands.config.config_args")
    read = accelerate_config.load_config_from_file(str(file))
    assert read.num_processes == {"cpu": 1, "cpu2": 2}.get(file.stem, 8)
