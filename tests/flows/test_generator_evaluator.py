"""The recipe of one model that writes and judges, end to end on the fake engine."""

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from flows.generator_evaluator import GeneratorEvaluator, generator_evaluator
from flows.presets import Preset
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.rows import Calibration, JudgedRollout, ScoredRollout
from tasks.judging import JudgeError
from tests.flows.builders import PRESETS, heard, stored

FOLDER = PRESETS / "generator_evaluator"
SMOKE = FOLDER / "smoke.yaml"
STAGES = ["base", "SFT Dataset 1", "SFT Dataset 2", "SFT Dataset 3", "SFT Dataset 4"]
STAGES += ["DPO (Dataset 4), sigmoid", "DPO (Dataset 4), sigmoid+sft"]
JUDGED = ("maj@8 with filter", "highest confidence of 8")


def config_of(preset: Path, *overrides: str) -> GeneratorEvaluator:
    return Preset(preset, overrides).config(GeneratorEvaluator)


def run_plainly(*overrides: str) -> Experiment:
    """Run the smoke preset without Prefect."""
    config = config_of(SMOKE, *overrides)
    generator_evaluator.fn(config)
    return Experiment(config.experiment)


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    assert config_of(preset).recipe == "generator_evaluator"


@pytest.mark.flow
def test_every_stage_is_recorded_with_its_strategies_and_its_calibration() -> None:
    experiment = run_plainly()
    records = {record.label: record for record in experiment.iterations()}
    assert list(records) == STAGES
    for label in ("SFT Dataset 1", "SFT Dataset 2", "SFT Dataset 4", *STAGES[5:]):
        assert set(JUDGED) <= set(records[label].metrics)
        rows = list(read_rows(DatasetRef(**records[label].references["calibration"]), Calibration))
        assert {row.writer for row in rows} == {"own", "base"}
    for label in ("base", "SFT Dataset 3"):  # neither was trained to judge
        assert not set(JUDGED) & set(records[label].metrics)
    assert records["SFT Dataset 1"].funnel["judge_rows"] > 0
    assert "judge_rows" not in records["SFT Dataset 3"].funnel
    assert records[STAGES[5]].funnel["pairs"] > 0
    report = CliRunner().invoke(app, ["report", experiment.name])
    html = Path(report.stdout.strip()).read_text()
    assert "The policy as a judge" in html
    judged = html[html.index("The policy as a judge") : html.index("What became of the rollouts")]
    for shown in (
        "<td>own</td>",
        "<td>base</td>",
        "solved 0-25 %",
        "AUROC",
        "within prompts",
        "ECE",
        "too sure by",
        "self-preference",
    ):
        assert shown in judged
    assert "unpaired: right only" in html or "unpaired: neither" in html
    assert "Published, and ours" not in html  # the smoke preset names none


@pytest.mark.flow
def test_label_free_stages_get_as_many_rollouts_of_each_prompt_whatever_gold_answers_had_others_get() -> None:
    section = "sampling.adaptive={first: 2, more: 2, wanted_correct: 1, wanted_incorrect: 1, cap: 12}"
    records = {record.label: record for record in run_plainly(section, "label_free.dpo=[]").iterations()}

    def numbers(label: str) -> set[int]:
        rows = read_rows(DatasetRef(**records[label].references["scored"]), ScoredRollout)
        return set(Counter(row.prompt_id for row in rows).values())

    assert len(numbers("SFT Dataset 1")) > 1
    assert len(numbers("SFT Dataset 2")) > 1
    assert numbers("SFT Dataset 3") == {8}
    assert {"pass_rates", "gold_checks"} <= set(records["SFT Dataset 2"].references)
    assert not {"pass_rates", "gold_checks"} & set(records["SFT Dataset 3"].references)
    assert any("drawn adaptively" in notice for notice in records["SFT Dataset 1"].notices)


@pytest.mark.flow
def test_a_second_run_is_all_cache() -> None:
    first = stored(run_plainly())
    with heard() as steps:
        again = stored(run_plainly())
    assert again == first
    assert [step.step for step in steps if not step.cached] == []


@pytest.mark.flow
def test_another_threshold_needs_no_new_judging() -> None:
    run_plainly()
    with heard() as steps:
        run_plainly("label_free.labelling.positive_threshold=0.8", "filter_above=dev", "label_free.dpo=[]")
    redone = {step.step for step in steps if not step.cached and step.iteration in (0, 1, 2)}
    assert redone == {"choose_filter", "evaluate_judgements"}
    assert not [step for step in steps if step.step == "judge_shard" and step.iteration == 3 and not step.cached]


@pytest.mark.flow
def test_gold_answers_of_the_label_free_prompts_change_data_set_2_and_nothing_free_of_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of data sets 2 to 4 are other ones than those of data set 1, and only their gold answers are poisoned."""
    honest = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(100, 180)]

    def run_on(name: str, rows: list[dict[str, str]]) -> Experiment:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"{{path: {folder}/train.jsonl, columns: {{answer: answer}}}}"
        return run_plainly(f"train={source}", f"experiment={name}", "gate.promote=always")

    first = {record.label: record for record in run_on("honest", honest).iterations()}
    drawn = {row.prompt for row in read_rows(DatasetRef(**_judged_of("honest")), JudgedRollout)}
    poisoned = [row | {"answer": "123456"} if row["prompt"] in drawn and n % 2 else row for n, row in enumerate(honest)]
    assert poisoned != honest
    second = {record.label: record for record in run_on("poisoned", poisoned).iterations()}
    assert second["SFT Dataset 1"].policy == first["SFT Dataset 1"].policy
    assert second["SFT Dataset 2"].references["scored"] != first["SFT Dataset 2"].references["scored"]
    for label in STAGES[3:]:
        assert second[label].policy == first[label].policy
        assert second[label].references == first[label].references
        assert second[label].metrics == first[label].metrics


def _judged_of(experiment: str) -> dict[str, object]:
    steps = Experiment(experiment).steps()
    step = next(step for step in steps if step.step == "gather_judged" and step.iteration == 3)
    return {"step": "judged", "digest": step.digest, "row_type": "JudgedRollout", "rows": step.rows}


@pytest.mark.flow
def test_a_judge_that_knows_nothing_stops_the_label_free_stages() -> None:
    with pytest.raises(JudgeError, match="The stages with gold answers are done and recorded"):
        run_plainly("label_free.gate.minimum_auroc=0.99")
    experiment = Experiment("generator-evaluator-smoke")
    assert [record.label for record in experiment.iterations()] == STAGES[:3]
    assert (experiment.folder / "report.html").is_file()
    go_on = run_plainly("label_free.gate.minimum_auroc=0.99", "label_free.gate.go_on_anyway=true", "label_free.dpo=[]")
    assert [record.label for record in go_on.iterations()] == STAGES[:5]


@pytest.mark.flow
def test_published_figures_stand_beside_ours() -> None:
    published = "published={SFT Dataset 1: {maj@8: 69, pass@16: 87}, DPO (Dataset 4): {maj@8: null}}"
    done = CliRunner().invoke(
        app, ["run", str(SMOKE), "--no-prefect-server", "--set", published, "--set", "label_free=null"]
    )
    assert done.exit_code == 0, done.output
    assert "Published, and ours" in done.stdout
    assert done.stdout.count("not run") == 2  # pass@16 of data set 1, and the whole DPO
    records = {record.label: record for record in Experiment("generator-evaluator-smoke").iterations()}
    page = next(Path(line.split(": ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("Report: "))
    html = page.read_text()
    ours = records["SFT Dataset 1"].metrics["maj@8"]["value"]
    assert f"<td>\n69<br><b>{100 * ours:.1f}</b>" in html
    assert html.count("not run") == 2


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "threshold above 1": (["label_free.labelling.positive_threshold=1.5"], ("positive_threshold", "1.5")),
    "filter below 0": (["filter_above=-1"], ("filter_above", "greater than or equal to 0")),
    "thresholds not apart": (["label_free.labelling.negative_threshold=0.9"], ("could be right and wrong",)),
    "more votes than rollouts": (
        ["label_free.labelling.minimum_votes=9"],
        ("minimum_votes is 9 but sampling.rollouts_per_prompt 8, so no answer could win",),
    ),
    "one label": (["judge.negative=Correct"], ("choose labels of which neither begins the other",)),
    "text without completion": (["judge.text=$prompt?"], ("$prompt and $completion",)),
    "misspelt mode": (["label_free.labelling.mode=vote"], ("label_free.labelling.mode", "'majority', 'top'")),
    "ratio of nothing": (["mixture.judge_rows_per_solve=0"], ("judge_rows_per_solve", "greater than 0")),
    "prompt in the system message": (
        ["template={system: $prompt, user: $prompt}"],
        ("put $prompt into template.user",),
    ),
    "misspelt key of a tiny base": (
        ["base={corpus: {arithmetic: {problems: 9}}, judgd: []}"],
        ("base.judgd: there is no such key", "base.judged: is missing"),
    ),
    "gate above n": (["gate.strategy=maj@9"], ("rollouts_per_prompt is 4 but maj@9 was asked for",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_configuration_is_told_and_nothing_is_written(name: str, ratchet_home: Path) -> None:
    overrides, told = BAD[name]
    done = CliRunner().invoke(app, ["run", str(SMOKE), *(part for one in overrides for part in ("--set", one))])
    assert done.exit_code == 2, done.output
    for part in told:
        assert part in done.stderr
    assert not ratchet_home.exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        pytest.param(["base.name=fake:0.0"], "kept 0 of", id="all rollouts wrong"),
        pytest.param(["base.name=fake:1.0"], "is wrong, and a judge is trained on both kinds", id="all right"),
        pytest.param(["judge.label_tokens=one", "judge.positive=It is"], "'It is' 2, 'Incorrect' 1", id="two tokens"),
        pytest.param(
            ["judge.minimum_label_mass=0.99", "judge.maximum_undecided=0.1"],
            "undecided (no label",
            id="never emits a label",
        ),
    ],
)
@pytest.mark.flow
def test_rollouts_and_judges_that_cannot_be_used_are_told(overrides: list[str], told: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run_plainly(*overrides)
    assert told in str(caught.value)


@pytest.mark.flow
def test_a_plan_names_every_step_and_shows_what_the_judge_is_asked(ratchet_home: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(SMOKE), "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert {"check_labels", "judge_shard", "mix_tasks", "check_judge", "pair_by_confidence"} <= {
        step["step"] for step in plan["steps"]
    }
    assert "Verdict:" in plan["first_prompts"]["judge"]["text"]
    assert not ratchet_home.exists()
