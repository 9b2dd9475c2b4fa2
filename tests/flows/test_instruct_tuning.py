"""The instruct_tuning recipe end to end on the fake engine, and what `ratchet export` makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.__main__ import app
from flows.instruct_tuning import InstructTuning, instruct_tuning
from flows.presets import Preset, PresetError
from models.specs import ModelRef
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.rows import ChatPair, Comparison, Conversation
from tasks.blending import blend
from tasks.checking import faults
from tasks.guarding import Guard
from tasks.tables import published_rows
from tests.benchmark_documents import write_documents
from tests.flows.builders import PRESETS, heard, stored

FOLDER = PRESETS / "instruct_tuning"
SMOKE = FOLDER / "smoke.yaml"


def config_of(preset: Path, *overrides: str) -> InstructTuning:
    return Preset(preset, overrides).config(InstructTuning)


def run_plainly(*overrides: str) -> Experiment:
    """Run the smoke preset without Prefect."""
    config = config_of(SMOKE, *overrides)
    instruct_tuning.fn(config)
    return Experiment(config.experiment)


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    assert config_of(preset).recipe == "instruct_tuning"


@pytest.mark.parametrize(("name", "pairs"), [("phi2_apo", 1), ("phi2_dpo", 3)])
def test_presets_of_the_seeds_read_their_data_sets_as_the_hub_has_them(
    name: str, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row in each set's own layout. Weights are taken away, for one row may not be drawn.
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    other = [turns[0], {"role": "assistant", "content": "No."}]
    both = {"prompt": "Hi?", "chosen": turns, "rejected": other}
    sets: dict[str, dict[str, Any]] = {
        "teknium/OpenHermes-2.5": {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
        "ContextualAI/ultrafeedback_clair_32k": both,
        "argilla/ultrafeedback-binarized-preferences-cleaned": both,
        "argilla/distilabel-intel-orca-dpo-pairs": {
            "system": "", "input": "3", "chosen": "4", "rejected": "5", "in_gsm8k_train": False
        },
        "argilla/distilabel-math-preference-dpo": {
            "instruction": "6", "chosen_response": "7", "rejected_response": "8"
        },
    }  # fmt: skip
    for hub, row in sets.items():
        (tmp_path / hub).mkdir(parents=True)
        (tmp_path / hub / "train.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    config = config_of(FOLDER / f"{name}.yaml")
    assert faults(config) == []
    assert config.preference is not None
    fake, nothing = ModelRef(name="fake:0.5"), Guard({}, ())
    for mixture, rows in ((config.conversations, 1), (config.preference.pairs, pairs)):
        whole = tuple(source.model_copy(update={"weight": 1.0}) for source in mixture.sources)
        assert blend(mixture.model_copy(update={"sources": whole}), nothing, fake).rows == rows


def test_lora_on_the_head_is_an_error_with_its_line(tmp_path: Path) -> None:
    preset = tmp_path / "head.yaml"
    preset.write_text(SMOKE.read_text().replace("learning_rate: 5.0e-4}", "lora: {target_modules: [lm_head]}}"))
    (line,) = [n for n, text in enumerate(preset.read_text().splitlines(), start=1) if text.startswith("sft:")]
    with pytest.raises(PresetError, match=rf"line {line}.*TRL 1\.16 refuses LoRA there"):
        config_of(preset)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dev=null"], "dev missing"),
        (["gate.maximum_benchmark_drop=0.02"], "there are no `benchmarks`"),
        (["sft.lora.merge=false"], "sft.lora.merge is false"),
        (["preference.training.lora.merge=false"], "the recipe ends in a model folder"),
        (["preference.training.loss_type=[apo_zero]"], "auto chooses the loss"),
        (["conversations.sources=[{source: {hub: teknium/OpenHermes-2.5}}]"], "accept_unclear_licence: true"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_do_not_fit_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        config_of(SMOKE, *overrides)


@pytest.mark.flow
def test_base_sft_and_preference_policy_get_a_row_each() -> None:
    experiment = run_plainly()
    base, sft, tuned = experiment.iterations()
    assert [record.label for record in (base, sft, tuned)] == ["base", "SFT", "SFT + APO"]
    assert base.metrics.keys() == sft.metrics.keys() == tuned.metrics.keys() == {"greedy", "mean@1"}
    assert sft.drops["not drawn by its weight in arithmetic:sums:train"] > 0
    conversations = list(read_rows(DatasetRef(**sft.references["conversations"]), Conversation))
    assert {row.source for row in conversations} == {"arithmetic:sums:train", "arithmetic:word_problems:train"}
    compared = DatasetRef(**tuned.references["compared"])
    margins = [row.margin for row in read_rows(compared, Comparison) if row.margin is not None]
    better = sum(margin > 0 for margin in margins) + 0.5 * sum(margin == 0 for margin in margins)
    (trained,) = [s for s in experiment.steps() if s.step == "choose_anchor"]
    assert trained.counts["chosen text is better"] == sum(margin > 0 for margin in margins)
    assert better / len(margins) > 0.5  # so apo_zero it was


@pytest.mark.flow
def test_a_second_run_reuses_every_step_and_another_beta_only_the_last_ones() -> None:
    first = stored(run_plainly())
    with heard() as again:
        assert stored(run_plainly()) == first
    assert all(step.cached for step in again)
    with heard() as other:
        run_plainly("preference.training.beta=0.2")
    assert {step.step for step in other if not step.cached} == {"train_preferences"}  # a fake learns the same


@pytest.mark.flow
def test_without_a_second_stage_the_sft_policy_is_the_last() -> None:
    assert [record.label for record in run_plainly("preference=null").iterations()] == ["base", "SFT"]


@pytest.mark.flow
def test_a_policy_that_loses_on_a_benchmark_is_not_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path)
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    fallen = {"base": 0.9, "SFT": 0.5}
    policies: list[str] = []

    def spoilt(policy: Any, *_: Any) -> Any:
        from storage.datasets import write_rows
        from storage.rows import EvaluatedPrompt

        policies.append(policy.identity)
        share = list(fallen.values())[min(len(set(policies)), 2) - 1]
        rows = [
            EvaluatedPrompt(
                prompt_id=f"mmlu/{n}", strategy="mmlu (5)", value=float(n < 10 * share), rollouts=1, k=1, undecided=0,
                answer=None,
            )
            for n in range(10)
        ]  # fmt: skip
        return write_rows(rows, EvaluatedPrompt, step="evaluated")

    monkeypatch.setattr("tasks.benchmarking.evaluate_benchmark", spoilt)
    monkeypatch.setattr("flows.instruct_tuning.evaluate_headlines", lambda answered, *_: answered[0])
    benchmarks = "benchmarks={tasks: [{task: gsm8k, limit: 2}]}"
    kept = run_plainly(benchmarks, "preference=null").iterations()[1]
    assert kept.promoted
    policies.clear()
    lost = run_plainly(benchmarks, "preference=null", "gate.maximum_benchmark_drop=0.118").iterations()[1]
    assert not lost.promoted
    assert lost.decision is not None
    assert "mmlu (5) went from 90.0 % to 50.0 % of 10 documents, -40.0 points from the base" in lost.decision["reason"]


@pytest.mark.flow
def test_published_figures_stand_beside_ours() -> None:
    experiment = run_plainly("published={SFT: {greedy: 40.0, mmlu (5): 44.88}}")
    rows = published_rows(experiment.config(), experiment.iterations())
    assert [(row.label, row.strategy, row.published, row.ours is None) for row in rows] == [
        ("SFT", "greedy", 40.0, False),
        ("SFT", "mmlu (5)", 44.88, True),
    ]


@pytest.mark.flow
def test_export_writes_folders_with_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = run_plainly()
    pairs = DatasetRef(**experiment.iterations()[2].references["pairs"])
    run = CliRunner()
    told = run.invoke(app, ["export", pairs.name, "--to", str(tmp_path / "pairs"), "--format", "trl"])
    assert told.exit_code == 0, told.output
    front = yaml.safe_load((tmp_path / "pairs" / "README.md").read_text().split("---")[1])
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    card = (tmp_path / "pairs" / "README.md").read_text()
    assert "| arithmetic:sums:train | own | 40 |" in card

    from datasets import load_dataset

    loaded = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    first = next(iter(read_rows(pairs, ChatPair)))
    assert len(loaded) == pairs.rows
    assert loaded[0]["chosen"] == [{"role": "assistant", "content": first.chosen}]

    told = run.invoke(app, ["export", experiment.name, "--to", str(tmp_path / "policy")])
    assert told.exit_code == 0, told.output
    card = (tmp_path / "policy" / "README.md").read_text()
    mean = experiment.iterations()[2].metrics["mean@1"]
    assert f"{100 * mean['value']:.1f} ({100 * mean['low']:.1f} to {100 * mean['high']:.1f}, n {mean['n']})" in card
    assert pairs.name in card
    reproduced = tmp_path / "policy" / "preset.yaml"
    assert json.loads(config_of(reproduced).model_dump_json()) == experiment.config()
    assert not (tmp_path / "policy" / "manifest.json").exists()

    again = run.invoke(app, ["export", experiment.name, "--to", str(tmp_path / "policy")])
    assert again.exit_code == 2
    assert "not empty" in again.output
    monkeypatch.delenv("HF_TOKEN", raising=False)
    pushed = run.invoke(app, ["export", experiment.name, "--to", str(tmp_path / "p2"), "--push", "me/mine"])
    assert pushed.exit_code == 2
    assert "environment variable HF_TOKEN" in " ".join(pushed.output.split())


def test_a_folder_is_pushed_with_the_token_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.publishing import push_folder

    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str) -> None:
            calls.append(("token", token))

        def create_repo(self, repository: str, **how: Any) -> None:
            calls.append((repository, how))

        def upload_folder(self, **how: Any) -> str:
            calls.append(("upload", how))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push_folder(tmp_path, "me/mine", "dataset") == "https://hub/commit"
    assert calls == [
        ("token", "hf_secret"),
        ("me/mine", {"repo_type": "dataset", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/mine", "folder_path": tmp_path, "repo_type": "dataset"}),
    ]
