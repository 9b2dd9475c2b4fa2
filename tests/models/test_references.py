"""SPIN's references: each iteration is trained against the policy before it, and nothing changes that policy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import trainers
from models.jobs import PreferenceJob
from models.specs import LoRA
from tests.models.test_trainers import MERGED, contents, figures, preference_job, seen, start

__all__ = ["preference_job", "seen", "start"]  # fixtures

pytestmark = pytest.mark.vllm


def log_probs_of(model: Any, row: dict[str, list[int]], side: str) -> float:
    import torch

    prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(log_probs.gather(1, torch.tensor(completion)[:, None]).sum())


@pytest.mark.parametrize("lora", [None, MERGED], ids=["full", "adapter merged first"])
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "on the fly"])
def test_the_second_iterations_reference_is_the_first_ones_policy_before_and_after_training(
    preference_job: Callable[..., PreferenceJob], seen: list[Any], lora: LoRA | None, precompute: bool
) -> None:
    from transformers import AutoModelForCausalLM

    first = preference_job("first", lora=lora, max_steps=3)
    trainers.fit_preferences(first)
    before = contents(first.output)
    second = preference_job("second", lora=lora, precompute_reference=precompute, epochs=3, schedule="constant")
    second = second.model_copy(update={"weights": str(first.output)})
    trainers.fit_preferences(second)
    losses = figures(second, "loss")
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6)  # as it starts, the policy is its own reference
    assert losses[max(losses)] < losses[1] - 0.01
    policy = AutoModelForCausalLM.from_pretrained(first.output)
    trainer, rows = seen[1], list(seen[1].train_dataset)[:4]
    expected = [log_probs_of(policy, row, side) for side in ("chosen", "rejected") for row in rows]
    if precompute:
        told = [row[f"ref_{side}_logps"] for side in ("chosen", "rejected") for row in rows]
    else:  # asked after the training
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        told = [
            float(value) for side in trainer.compute_ref_log_probs(model, trainer.data_collator(rows)) for value in side
        ]
    assert told == [pytest.approx(value, rel=1e-4) for value in expected]
    assert contents(Path(first.output)) == before
