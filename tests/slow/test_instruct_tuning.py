"""The tiny preset for real: a new chat format is learnt, and preference training does what it is asked to."""

from pathlib import Path

import pytest

from flows.instruct_tuning import InstructTuning, instruct_tuning
from flows.presets import Preset
from storage.checkpoints import checkpoint_path
from storage.experiments import Experiment
from tests.flows.builders import PRESETS

pytestmark = pytest.mark.slow


def test_every_stage_of_the_tiny_preset_improves_on_the_one_before() -> None:
    overrides = ("benchmarks=null", "gate.maximum_benchmark_drop=null")
    config = Preset(PRESETS / "instruct_tuning" / "tiny.yaml", overrides).config(InstructTuning)
    instruct_tuning.fn(config)
    base, sft, tuned = Experiment(config.experiment).iterations()
    assert sft.metrics["mean@1"]["value"] > base.metrics["mean@1"]["high"]
    assert tuned.metrics["mean@1"]["value"] > sft.metrics["mean@1"]["value"]
    folder = checkpoint_path(tuned.policy["digest"])
    assert {file.name for file in Path(folder).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
