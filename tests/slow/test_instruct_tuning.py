"""The tiny preset for real: a new chat format is learnt, and preference training is measured and decided on."""

from pathlib import Path

import pytest

from flows.instruct_tuning import InstructTuning, instruct_tuning
from flows.presets import Preset
from storage.checkpoints import checkpoint_path
from storage.experiments import Experiment
from tests.flows.builders import PRESETS

pytestmark = pytest.mark.slow


def test_fine_tuning_helps_the_tiny_base_and_preference_training_stands_only_if_it_helps() -> None:
    overrides = ("benchmarks=null", "gate.maximum_benchmark_drop=null")
    config = Preset(PRESETS / "instruct_tuning" / "tiny.yaml", overrides).config(InstructTuning)
    instruct_tuning.fn(config)
    base, sft, tuned = Experiment(config.experiment).iterations()
    assert sft.metrics["mean@1"]["value"] > base.metrics["mean@1"]["high"]
    assert sft.promoted
    assert tuned.decision is not None
    assert tuned.promoted == (tuned.decision["difference"] > 0 and tuned.decision["p_value"] < config.gate.alpha)
    folder = checkpoint_path(tuned.policy["digest"])
    assert {file.name for file in Path(folder).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
