"""The recipe AutoIF end to end: a fake policy, a scripted supervisor, the real sandbox."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.__main__ import app
from flows.autoif import AutoIF, autoif
from flows.presets import Preset, PresetError
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment, StepRecord
from storage.rows import (
    BackTranslation,
    CheckedVerifier,
    Instance,
    Instruction,
    Pair,
    Prompt,
    ScoredRollout,
    Verification,
)
from tasks.pairing import NothingPaired
from tasks.sandbox import SandboxError
from tasks.supervising import SupervisorError
from tasks.verifying import NothingSurvives
from tasks.yields import yields
from tests.flows.builders import PRESETS, REPOSITORY, heard, stored

FOLDER = PRESETS / "autoif"
SMOKE = FOLDER / "smoke.yaml"
SCRIPT = REPOSITORY / "deployments" / "scripts" / "autoif_smoke.yaml"
ASK_INSTRUCTION, ASK_VERIFIER, ASK_CASES = "Write one new instruction", "Write a Python function", "Write two answers"
GOOD = "```python\ndef evaluate(response):\n    return 'FINAL ANSWER' in response{}\n```"
CASES = '{"response": "FINAL ANSWER: 3", "result": true}\n{"response": "So it is 3", "result": false}'


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets name their scripts as seen from the repository."""
    monkeypatch.chdir(REPOSITORY)


def config_of(preset: Path, *overrides: str) -> AutoIF:
    return Preset(preset, overrides).config(AutoIF)


def run_plainly(*overrides: str) -> Experiment:
    """Run the smoke preset without Prefect."""
    config = config_of(SMOKE, *overrides)
    autoif.fn(config)
    return Experiment(config.experiment)


def scripted(folder: Path, *, instructions: Iterable[str] = (), verifiers: Iterable[str] = (), cases: str = "") -> str:
    """The override that has another supervisor: what is not given is as in the smoke preset's script."""
    rules: list[dict[str, Any]] = []
    for asked, replies in ((ASK_INSTRUCTION, instructions), (ASK_VERIFIER, verifiers), (ASK_CASES, [cases])):
        if any(replies):
            rules.append({"when": [asked], "replies": list(replies)})
    script = yaml.safe_load(SCRIPT.read_text())
    file = folder / "script.yaml"
    file.write_text(yaml.safe_dump({"rules": [*rules, *script["rules"]]}))
    return f"supervisor.model.name={file}"


def rows_of(experiment: Experiment, step: str, row_type: type[Any], **place: object) -> list[Any]:
    """The rows of the last data set that a step wrote."""
    records = [one for one in experiment.steps() if one.step == step and one.digest and _is_at(one, place)]
    folders = {"read_instructions": "instructions", "combine_instances": "instances", "pair_rollouts": "pairs"}
    folders |= {"check_verifiers": "checked", "drop_contradicted": "checked", "verify_rollouts": "verifications"}
    folders |= {"score_by_votes": "scored", "read_comparisons": "back_translations", "ask_plainly": "prompts"}
    last = records[-1]
    assert last.digest is not None and last.rows is not None
    ref = DatasetRef(step=folders[step], digest=last.digest, row_type=row_type.__name__, rows=last.rows)
    return list(read_rows(ref, row_type))


def _is_at(record: StepRecord, place: dict[str, object]) -> bool:
    return all(getattr(record, name) == value for name, value in place.items())


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    assert config_of(preset).recipe == "autoif"


@pytest.mark.flow
def test_the_smoke_preset_raises_the_pass_rate_of_held_out_instructions() -> None:
    experiment = run_plainly()
    base, trained = experiment.iterations()
    assert (base.label, trained.label) == ("base", "DPO, beta 0.1")
    assert trained.dev_metrics["mean@1"]["value"] > base.dev_metrics["mean@1"]["value"]
    assert trained.decision is not None and trained.decision["n"] == base.dev_metrics["mean@1"]["n"]
    assert trained.funnel["pairs"] == trained.funnel["trained_on"] > 0


@pytest.mark.flow
def test_no_instruction_and_no_prompt_is_both_trained_on_and_measured() -> None:
    experiment = run_plainly()
    splits = {name: rows_of(experiment, "combine_instances", Instance, split=name) for name in (None, "dev", "test")}
    for column in ("instruction_id", "prompt_id", "query_id"):
        seen = Counter(one for rows in splits.values() for one in {getattr(row, column) for row in rows})
        assert max(seen.values()) == 1, column
    trained = {row.prompt_id for row in rows_of(experiment, "pair_rollouts", Pair)}
    assert trained <= {row.prompt_id for row in splits[None]}


@pytest.mark.flow
def test_verifiers_are_shown_for_half_of_the_completions_and_never_in_training_or_evaluation() -> None:
    experiment = run_plainly()
    words = rows_of(experiment, "verify_rollouts", Verification, split=None)
    shown = {(row.prompt_id, row.rollout_index) for row in words if row.shown}
    assert {index >= 4 for _, index in shown} == {True}
    assert {row.rollout_index < 4 for row in words if not row.shown} == {True}
    assert not any(row.shown for row in rows_of(experiment, "verify_rollouts", Verification, split="test"))
    pairs = rows_of(experiment, "pair_rollouts", Pair)
    assert not any("def evaluate" in row.prompt for row in pairs)
    assert {row.chosen_index >= 4 for row in pairs} == {True, False}
    assert all("def evaluate" not in row.prompt for row in rows_of(experiment, "ask_plainly", Prompt))


@pytest.mark.flow
def test_every_row_that_was_executed_names_its_isolation() -> None:
    experiment = run_plainly()
    levels = {row.isolation for row in rows_of(experiment, "verify_rollouts", Verification)}
    levels |= {row.isolation for row in rows_of(experiment, "check_verifiers", CheckedVerifier)}
    (level,) = levels
    assert "seccomp" in level
    assert {row.scorer for row in rows_of(experiment, "score_by_votes", ScoredRollout)} == {f"verifiers@1, {level}"}


@pytest.mark.flow
def test_trivial_verifiers_and_their_instructions_are_left_out_with_their_reasons() -> None:
    experiment = run_plainly()
    checked = rows_of(experiment, "check_verifiers", CheckedVerifier)
    instructions = {row.instruction_id: row for row in rows_of(experiment, "read_instructions", Instruction)}
    nice = [row for row in checked if instructions[row.instruction_id].instruction == "Be nice."]
    assert {row.reason.partition(":")[0] for row in nice} == {"trivial"}
    used = {row.instruction_id for row in rows_of(experiment, "combine_instances", Instance, split=None)}
    assert used <= {row.instruction_id for row in checked if row.kept}
    per_instruction = Counter(row.instruction_id for row in checked if row.kept)
    assert min(per_instruction.values()) >= 2
    translated = rows_of(experiment, "read_comparisons", BackTranslation)
    assert {row.verifier_id for row in translated} == {row.verifier_id for row in checked if row.kept}


@pytest.mark.flow
def test_a_second_run_is_all_cache() -> None:
    first = stored(run_plainly())
    with heard() as steps:
        again = stored(run_plainly())
    assert again == first
    assert [step.step for step in steps if not step.cached] == []


@pytest.mark.flow
def test_another_learning_rate_redoes_the_training_and_nothing_before_it() -> None:
    run_plainly()
    with heard() as steps:
        run_plainly("dpo=[{beta: 0.1, learning_rate: 2e-6}]")
    assert {step.step for step in steps if not step.cached} == {"train_preferences"}  # the fake ends up the same


@pytest.mark.flow
def test_a_reworded_script_is_another_supervisor(tmp_path: Path) -> None:
    run_plainly()
    with heard() as steps:
        run_plainly(scripted(tmp_path))  # the same rules, but not the same bytes
    assert "read_verifiers" in {step.step for step in steps if not step.cached}


@pytest.mark.flow
def test_several_settings_of_dpo_train_on_the_same_pairs() -> None:
    records = run_plainly("dpo=[{beta: 0.1}, {beta: 1.0}, {beta: 0.1, loss_type: [sigmoid, sft]}]").iterations()
    assert [record.label for record in records] == ["base", "DPO, beta 0.1", "DPO, beta 1", "DPO, beta 0.1, NLL"]
    assert len({json.dumps(record.references["scored"]) for record in records[1:]}) == 1


@pytest.mark.flow
def test_a_scheduled_run_trains_and_measures_one_policy_and_the_next_run_another() -> None:
    config = config_of(SMOKE, "dpo=[{beta: 0.1}, {beta: 1.0}]")
    for labels in (["base", "DPO, beta 0.1"], ["base", "DPO, beta 0.1", "DPO, beta 1"]):
        autoif.fn(config, advance=True)
        assert [record.label for record in Experiment(config.experiment).iterations()] == labels


@pytest.mark.flow
def test_the_report_shows_yields_and_published_figures_beside_ours() -> None:
    published = 'published={base: {mean@1: 41.5, "ifeval x": 3.0}, seed 4: {mean@1: 50.0}}'
    experiment = run_plainly(published, "published_yields={seed 4: {queries: 10000, instances: 1836}}")
    table = yields(experiment.config(), experiment.steps(run=experiment.state().run))
    assert table is not None
    ours = {row.stage: row.ours for row in table.rows}
    trained = rows_of(experiment, "combine_instances", Instance, split=None)
    assert (ours["queries"], ours["instances"], ours["completions"]) == (30, len(trained), 8 * len(trained))
    assert ours["pass:fail"] == pytest.approx((ours["passing"] or 0) / (ours["failing"] or 1))
    assert [row.published for row in table.rows if row.stage in ("queries", "instances")] == [(10000,), (1836,)]
    html = (experiment.folder / "report.html").read_text()
    for part in ("From queries to pairs", "1,836", "pass:fail", "41.5", "not run"):
        assert part in html


@pytest.mark.flow
def test_ifeval_and_hellaswag_stand_beside_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("RATCHET_DATA") or str(REPOSITORY.parent / "shared" / "data")
    if not Path(folder, "ifeval").is_dir():
        pytest.skip("IFEval's prompts are not here; name the folder that holds ifeval/ in RATCHET_DATA")
    for library in ("immutabledict", "langdetect"):
        pytest.importorskip(library, reason=f"lm-eval's IFEval needs {library}")
    monkeypatch.setenv("RATCHET_DATA", folder)
    published = "published={base: {ifeval prompt_level_strict_acc: 49.53, ifeval average: 57.97}}"
    experiment = run_plainly("benchmarks={tasks: [{task: ifeval, limit: 4}]}", published)
    base, trained = experiment.iterations()
    for record in (base, trained):
        four = [figure for name, figure in record.metrics.items() if name.startswith("ifeval") and "_acc" in name]
        assert len(four) == 4 and {figure["n"] for figure in four} == {4}
        mean = sum(figure["value"] for figure in four) / 4
        assert record.metrics["ifeval average"]["value"] == pytest.approx(mean)
    html = (experiment.folder / "report.html").read_text()
    assert "49.53" in html and '">not run<' not in html


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        pytest.param({"verifiers": ["I would look for the words."]}, ("prose ", "```python block"), id="prose"),
        pytest.param({"verifiers": ["def evaluate(response):\n    return True"]}, ("no code fence ",), id="no fence"),
        pytest.param(
            {"verifiers": ["```javascript\nfunction evaluate(r) {}\n```"]},
            ("code in another language ",),
            id="another language",
        ),
        pytest.param({"cases": '{"response": "a, "result": true}'}, ("broken JSON ", "cases.text"), id="broken JSON"),
        pytest.param({"instructions": ["Sure! Here is one."]}, ("prose ", "proposing.examples"), id="no instruction"),
    ],
)
@pytest.mark.flow
def test_a_supervisor_whose_replies_cannot_be_read_is_quoted_with_what_to_change(
    tmp_path: Path, replies: dict[str, Any], told: tuple[str, ...]
) -> None:
    with pytest.raises(SupervisorError) as caught:
        run_plainly(scripted(tmp_path, **replies))
    for part in ("replies hold no", "The first:", *told):
        assert part in str(caught.value)


@pytest.mark.flow
def test_a_few_bad_replies_are_counted_by_reason_and_do_no_harm() -> None:
    experiment = run_plainly()
    (read,) = [record for record in experiment.steps() if record.step == "read_verifiers"]
    assert read.counts["prose"] > 0 and read.counts["duplicate"] > 0
    assert "instructions without a verifier" not in read.counts
    assert read.counts["replies"] == read.counts["verifiers"] + read.counts["duplicate"] + read.counts["prose"]


@pytest.mark.flow
def test_an_instruction_that_gets_no_verifier_at_all_is_counted(tmp_path: Path) -> None:
    script = yaml.safe_load(SCRIPT.read_text())
    script["rules"].insert(0, {"when": [ASK_VERIFIER, "Instruction: Be nice"], "replies": ["Niceness is in the eye."]})
    (tmp_path / "script.yaml").write_text(yaml.safe_dump(script))
    experiment = run_plainly(f"supervisor.model.name={tmp_path / 'script.yaml'}")
    (read,) = [record for record in experiment.steps() if record.step == "read_verifiers"]
    assert read.counts["instructions without a verifier"] == 1


@pytest.mark.parametrize(
    ("verifiers", "told"),
    [
        pytest.param([GOOD.format(""), GOOD.format(" or True")], "trivial: accepts", id="one good, one trivial"),
        pytest.param(["```python\ndef evaluate(response):\n    return 1\n```"], "broke on every text: invalid", id="1"),
        pytest.param(["```python\ndef evaluate(response):\n    return exit()\n```"], "broke on every text", id="exits"),
    ],
)
@pytest.mark.flow
def test_instructions_without_a_surviving_verifier_are_counted_by_reason(
    tmp_path: Path, verifiers: list[str], told: str
) -> None:
    with pytest.raises(NothingSurvives) as caught:
        run_plainly(scripted(tmp_path, verifiers=verifiers, cases=CASES))
    assert "no instruction has verifiers left" in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        pytest.param("'FINAL' not in response and '=' not in response", "prompt without a chosen", id="none passes"),
        pytest.param("len(response) > 0", "prompt without a rejected", id="all pass"),
    ],
)
@pytest.mark.flow
def test_completions_that_all_pass_or_all_fail_make_no_pair_and_are_shown(
    tmp_path: Path, condition: str, told: str
) -> None:
    verifiers = [f"```python\ndef evaluate(response):\n    return {condition}{more}\n```" for more in ("", " and True")]
    cases = '{"response": "no", "result": true}\n{"response": "", "result": false}'
    if told == "prompt without a chosen":
        cases = '{"response": "no", "result": true}\n{"response": "FINAL = 3", "result": false}'
    with pytest.raises((NothingPaired, SupervisorError)) as caught:
        run_plainly(scripted(tmp_path, verifiers=verifiers, cases=cases), "judge=null", "back_translation=null")
    assert "made no pair of" in str(caught.value) and told in str(caught.value)
    assert "reward" in str(caught.value)
    steps = Experiment("autoif-smoke").steps()
    counts = [record.counts for record in steps if record.step == "score_by_votes" and record.iteration == 1][-1]
    which = "where no completion passes" if told == "prompt without a chosen" else "where all completions pass"
    assert counts[f"instances {which}"] > 0


@pytest.mark.flow
def test_completions_that_are_all_cut_are_told_with_what_to_change() -> None:
    with pytest.raises(NothingSurvives, match="raise max_completion_tokens"):
        run_plainly("completing.sampling.max_completion_tokens=1")


@pytest.mark.flow
def test_too_many_completions_without_a_reward_are_counted_quoted_and_told_what_to_change() -> None:
    with pytest.raises(NothingSurvives) as caught:  # the fake cuts some
        run_plainly("voting.maximum_undecided=0.0")
    for part in ("completions have no reward", "truncated ", "The first:", "raise max_completion_tokens"):
        assert part in str(caught.value)


@pytest.mark.flow
def test_a_run_that_fails_in_training_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory left"):
        patch.setattr("models.fake_engine.train_fake", no_memory)
        run_plainly()
    with heard() as steps:
        run_plainly()
    again = [step for step in steps if not step.cached]
    assert again[0].step == "train_preferences"
    assert {step.iteration for step in again} == {1}
    assert not {"pair_rollouts", "show_verifiers", "ask_the_judge"} & {step.step for step in again}


@pytest.mark.flow
def test_a_judge_that_never_gives_a_number_is_quoted(tmp_path: Path) -> None:
    script = yaml.safe_load(SCRIPT.read_text())
    script["rules"].insert(0, {"when": ["How well does the answer serve"], "replies": ["Splendid."]})
    (tmp_path / "script.yaml").write_text(yaml.safe_dump(script))
    with pytest.raises(SupervisorError, match=r"(?s)gave no number from 0 to 10 in .*'Splendid\.'.*Reword judge\.text"):
        run_plainly(f"supervisor.model.name={tmp_path / 'script.yaml'}")


@pytest.mark.flow
def test_what_the_judge_refuses_is_neither_chosen_nor_rejected(tmp_path: Path) -> None:
    script = yaml.safe_load(SCRIPT.read_text())
    script["rules"].insert(0, {"when": ["How well does the answer serve", "So it is"], "replies": ["3"]})
    (tmp_path / "script.yaml").write_text(yaml.safe_dump(script))
    experiment = run_plainly(f"supervisor.model.name={tmp_path / 'script.yaml'}")
    refused = [record.counts for record in experiment.steps() if record.step == "apply_judge"][-1]["refused"]
    assert refused > 0
    pairs = rows_of(experiment, "pair_rollouts", Pair)
    assert not any("So it is" in row.chosen for row in pairs)


BAD = {
    "majority": (["gate.strategy=maj@4"], ("votes on answers, and completions have none here",)),
    "one verifier": (["consistency.minimum_verifiers=1"], ("greater than or equal to 2",)),
    "no such script": (["supervisor.model.name=none.yaml"], ("supervisor.model.name: the script 'none.yaml'",)),
    "twins": (["dpo=[{beta: 0.1}, {beta: 0.1}]"], ("the report could not tell apart",)),
    "no dpo": (["dpo=[]"], ("at least 1 item",)),
    "a text without its name": (["verifiers.text=Write it."], ("the text is to hold $instruction, $query",)),
    "thresholds": (["pairing.rejected_maximum=0.6"], ("one rollout could stand on both sides",)),
    "a supervisor of no use": (["supervisor=null", "base={corpus: {formats: {problems: 9}}}"], ("name a supervisor",)),
    "a policy that is a script": (["engine={kind: scripted}", f"base.name={SCRIPT}"], ("a script cannot be trained",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_configuration_is_told_and_nothing_is_written(name: str, ratchet_home: Path) -> None:
    overrides, told = BAD[name]
    done = CliRunner().invoke(app, ["run", str(SMOKE), *(part for one in overrides for part in ("--set", one))])
    assert done.exit_code == 2, done.output
    for part in told:
        assert part in done.stderr
    assert not ratchet_home.exists()


@pytest.mark.flow
@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_names_every_stage_shows_what_is_asked_and_writes_nothing(
    preset: Path, ratchet_home: Path, made_up_hub: Path
) -> None:
    if "task: ifeval" in preset.read_text():
        pytest.importorskip("immutabledict", reason="lm-eval's IFEval needs it")
        pytest.importorskip("langdetect", reason="lm-eval's IFEval needs it")
    done = CliRunner().invoke(app, ["plan", str(preset), "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    stages = {"load_queries", "read_instructions", "read_verifiers", "read_cases", "check_verifiers"}
    stages |= {"combine_instances", "verify_rollouts", "score_by_votes", "pair_rollouts", "train_preferences"}
    assert stages <= {step["step"] for step in plan["steps"]}
    assert not ratchet_home.exists()
    query = "Why " if "hub: Anthropic" in preset.read_text() else "What is"
    prompts = {stage: told["text"] for stage, told in plan["first_prompts"].items()}
    assert query in prompts["policy"] and "(an instruction)" in prompts["policy"]
    assert {"supervisor, for a verifier", "supervisor, for cases"} <= set(prompts)
    assert "Human:" not in "".join(prompts.values())


@pytest.mark.flow
@pytest.mark.parametrize("preset", ["llama32_1b", "llama31_8b", "paper"])
def test_a_preset_for_gpus_plans_without_its_benchmarks(preset: str, ratchet_home: Path, made_up_hub: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(FOLDER / f"{preset}.yaml"), "--set", "benchmarks=null", "--json"])
    assert done.exit_code == 0, done.output
    steps = [step["step"] for step in json.loads(done.stdout)["steps"]]
    assert steps.count("train_preferences") == len(config_of(FOLDER / f"{preset}.yaml").dpo)
    assert not ratchet_home.exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        pytest.param(["length={shortest: 150, longest: 200}"], "queries: the source has no query to use", id="length"),
        pytest.param(["between=['Human:', 'Assistant:']"], "test: the source has no query to use", id="between"),
        pytest.param(["queries={path: none.jsonl}"], "queries: none.jsonl is not a file", id="no file"),
    ],
)
def test_a_source_without_a_query_to_use_is_told_before_anything_runs(
    overrides: list[str], told: str, ratchet_home: Path
) -> None:
    done = CliRunner().invoke(app, ["run", str(SMOKE), *(part for one in overrides for part in ("--set", one))])
    assert (done.exit_code, told in done.stderr) == (2, True), done.stderr
    assert not ratchet_home.exists()


def test_without_a_sandbox_nothing_runs_unless_that_is_allowed_by_name(
    monkeypatch: pytest.MonkeyPatch, ratchet_home: Path
) -> None:
    """What is allowed when is tasks/sandbox's to test; here, that the flag reaches it and the fault the terminal."""
    allowed = []

    def isolation(limits: object = None, *, allow_unsandboxed: bool = False) -> str:
        if allow_unsandboxed or allowed:
            allowed.append(allow_unsandboxed)
            return "none"
        raise SandboxError("seccomp: not here; use --allow-unsandboxed")

    monkeypatch.setattr("tasks.sandbox.isolation", isolation)
    monkeypatch.setattr("flows.autoif.isolation", isolation)
    monkeypatch.setattr("flows.__main__._run_flow", lambda recipe, plainly: None)
    refused = CliRunner().invoke(app, ["run", str(SMOKE)])
    assert (refused.exit_code, "limits: seccomp: not here" in refused.stderr) == (2, True)
    assert not ratchet_home.exists()
    CliRunner().invoke(app, ["run", str(SMOKE), "--allow-unsandboxed"])
    assert allowed[0] is True


@pytest.mark.flow
def test_a_scheduled_run_without_a_sandbox_samples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def isolation(limits: object) -> str:
        raise SandboxError("seccomp: not here")

    monkeypatch.setattr("flows.autoif.isolation", isolation)
    with heard() as steps, pytest.raises(SandboxError, match="seccomp: not here"):
        run_plainly()
    assert steps == []


def test_no_preset_can_allow_what_the_flag_allows() -> None:
    with pytest.raises(PresetError, match=r"limits\.allow_unsandboxed: there is no such key"):
        config_of(SMOKE, "limits.allow_unsandboxed=true")
