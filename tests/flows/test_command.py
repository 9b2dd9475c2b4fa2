"""The `ratchet` command: what is wrong is said before anything is written, what is there is told to programs too."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.__main__ import app
from models import fake_engine
from storage.experiments import Experiment
from tests.flows.builders import SMOKE, stored, train_noised, tree
from tests.models.tiny_fixture import save_tokenizer

pytestmark = pytest.mark.flow  # whole runs on the fake engine

Files = Callable[[Path], list[str]]  # makes files in a folder, returns --set options and the like


class Bad(NamedTuple):
    """A wrong configuration: options, or a function that makes files for it, and what the message holds."""

    options: "list[str] | Files"
    told: tuple[str, ...]


def ratchet(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> Any:
    """What the command prints for programs."""
    done = ratchet(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def train_rows(*rows: tuple[str, object]) -> Files:
    """Training rows of a file of (prompt, answer) rows."""

    def make(folder: Path) -> list[str]:
        file = folder / "train.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows))
        return [f"train={{path: {file}, columns: {{answer: answer}}}}"]

    return make


def model_folder(*, tokenizer: bool) -> Files:
    """A base that is a folder of weights, with a tokenizer that has no chat template, or without."""

    def make(folder: Path) -> list[str]:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "phi"}')
        (model / "model.safetensors").write_bytes(b"weights")
        if tokenizer:
            save_tokenizer(model, chat_template=None)
        return [f"base={{name: {model}}}", "engine={kind: vllm, max_model_len: 256}"]

    return make


BAD = {
    "misspelt key": Bad(
        ["sampling.temprature=1"], ("sampling.temprature: there is no such key", "did you mean 'temperature'?")
    ),
    "wrong type": Bad(["iterations=two"], ("iterations: Input should be a valid integer", "found 'two'")),
    "out of range": Bad(["sampling.top_p=1.5"], ("sampling.top_p: Input should be less than or equal to 1", "1.5")),
    "no equals sign": Bad(["iterations"], ("--set 'iterations' is no a.b=c",)),
    "unknown section": Bad(["speed.fast=1"], ("speed: there is no such key",)),
    "another recipe": Bad(["recipe=ppo"], ("recipe is 'ppo'", "this version has: rest_em")),
    "no recipe": Bad(["recipe=null"], ("recipe", "this version has: rest_em")),
    "name with a slash": Bad(["experiment=a/b"], ("experiment: String should match pattern", "found 'a/b'")),
    "missing file": Bad(["train={path: nowhere.jsonl}"], ("train: nowhere.jsonl is not a file in",)),
    "gold answer": Bad(
        train_rows(("1 + 1?", "2"), ("1 + 2?", "three or so")),
        ("train: train.jsonl: the gold answer of row 2 is 'three or so', a number was expected",),
    ),
    "answer that is a number": Bad(
        train_rows(("1 + 1?", 2)), ("train.jsonl row 1: column 'answer' is 2, expected text",)
    ),
    "duplicate prompts": Bad(
        train_rows(("1 + 1?", "2"), ("1 + 3?", "4"), ("1 + 1?", "2")),
        ("train: train.jsonl: rows 1 and 3 hold the same prompt", "remove one"),
    ),
    "empty prompt": Bad(train_rows(("", "2")), ("train.jsonl row 1: column 'prompt' is empty, expected a prompt",)),
    "missing column": Bad(
        lambda folder: [*train_rows(("1 + 1?", "2"))(folder), "train.columns.prompt=question"],
        ("row 1: expected a column 'question', found ['answer', 'prompt']",),
    ),
    "no gold answers": Bad(
        lambda folder: [*train_rows(("1 + 1?", "2"))(folder), "train.columns.answer=null"],
        ("train: train.jsonl has no gold answers; name their column in train.columns.answer",),
    ),
    "rows past the end": Bad(
        ["train.rows.start=100000"], ("train: the source has no rows; see train.rows and train.limit",)
    ),
    "train in test": Bad(
        ["train={arithmetic: {kind: sums, problems: 80, split: test}}"],
        ("also stands in train, so the figures would be of prompts that were trained on",),
    ),
    "dev in test": Bad(["dev.rows.start=0"], ("test: the prompt", "also stands in dev")),
    "pass@k above n": Bad(
        ["evaluation.test=[{strategies: [pass@16], sampling: {rollouts_per_prompt: 4}}]"],
        ("rollouts_per_prompt is 4 but pass@16 was asked for; raise it to 16 or drop k=16",),
    ),
    "gate above n": Bad(["gate.strategy=maj@9"], ("rollouts_per_prompt is 4 but maj@9 was asked for",)),
    "greedy at a temperature": Bad(
        ["evaluation.test=[{strategies: [greedy], sampling: {temperature: 0.5}}]"],
        ("temperature is 0.5 but greedy was asked for",),
    ),
    "unknown strategy": Bad(
        ["evaluation.test=[{strategies: [best@2], sampling: {}}]"], ("no strategy is called 'best@2'",)
    ),
    "fake model on vLLM": Bad(
        ["engine={kind: vllm, max_model_len: 256}"], ("base.name is 'fake:0.4' with engine.kind 'vllm'",)
    ),
    "real model on the fake engine": Bad(["base.name=microsoft/phi-2"], ("a fake engine serves names like 'fake:0",)),
    "fake model of no skill": Bad(["base.name=fake:a lot"], ("'fake:a lot' is no fake model",)),
    "missing model folder": Bad(
        ["base.name=./nowhere", "engine={kind: vllm}"], ("base.name: there is no folder './nowhere'",)
    ),
    "no room for a prompt": Bad(
        ["engine={kind: vllm, max_model_len: 64}"],
        ("sampling.max_completion_tokens is 64 but engine.max_model_len is 64, which leaves no room for a prompt",),
    ),
    "missing accelerate file": Bad(
        ["sft.accelerate_config=none.yaml"], ("sft.accelerate_config: there is no file 'none.yaml'",)
    ),
    "model folder without tokenizer": Bad(model_folder(tokenizer=False), ("base: ", "/model", "tokenizer")),
    "model folder without chat template": Bad(model_folder(tokenizer=True), ("base: ", "/model", "chat template")),
}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.flow] if name.startswith("model folder") else []) for name in BAD]
)  # a tokenizer is looked for with transformers, which takes seconds to import
def test_a_wrong_configuration_is_told_and_nothing_is_written(
    name: str, command: str, tmp_path: Path, ratchet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, told = BAD[name]
    settings = options(tmp_path) if callable(options) else options
    before = tree(tmp_path)
    done = ratchet(command, SMOKE, *(part for setting in settings for part in ("--set", setting)))
    assert done.exit_code == 2, done.output
    for part in told:
        assert part in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not ratchet_home.exists()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("recipe: [", ("preset.yaml is no YAML", "line 1"), id="syntax"),
        pytest.param("- a\n", ("preset.yaml holds list",), id="list"),
        pytest.param("experiment: words\n", ("recipe is ''", "this version has: rest_em"), id="recipe missing"),
        pytest.param("recipe: rest-em\n", ("recipe is 'rest-em'",), id="recipe misspelt"),
        pytest.param(
            "recipe: rest_em\n", ("experiment: is missing", "base: is missing", "sft: is missing"), id="empty"
        ),
        pytest.param(None, ("there is no preset", "deployments/presets/rest_em/tiny.yaml"), id="no file"),
    ],
)
def test_a_file_that_is_no_preset_is_told(
    text: str | None, told: tuple[str, ...], tmp_path: Path, ratchet_home: Path
) -> None:
    preset = tmp_path / "preset.yaml"
    if text is not None:
        preset.write_text(text)
    done = ratchet("run", preset)
    assert done.exit_code == 2
    for part in told:
        assert part in done.stderr
    assert not ratchet_home.exists()


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = ratchet("run", SMOKE, "--home", tmp_path / "file" / "home")
    assert done.exit_code == 2
    assert f"the home {tmp_path}/file/home cannot be written" in done.stderr
    assert "--home or RATCHET_HOME" in done.stderr


def test_all_faults_are_told_at_once(ratchet_home: Path) -> None:
    done = ratchet("run", SMOKE, "--set", "base.name=microsoft/phi-2", "--set", "dev.rows.start=0")
    assert done.exit_code == 2
    assert "base.name" in done.stderr
    assert "also stands in dev" in done.stderr


def test_a_plan_of_a_new_experiment_says_that_all_would_run_and_writes_nothing(ratchet_home: Path) -> None:
    done = ratchet("plan", SMOKE)
    assert done.exit_code == 0, done.output
    assert re.search(r"0 of \d+ steps are cached", done.stdout)
    assert "First prompt, base" in done.stdout
    assert "What is " in done.stdout
    assert not ratchet_home.exists()


def test_a_plan_of_a_finished_experiment_says_that_all_is_cached(finished: Path) -> None:
    before = tree(finished)
    steps = json_of("plan", SMOKE)["steps"]
    assert [step["step"] for step in steps if not step["cached"]] == []
    assert tree(finished) == before


def test_a_plan_with_another_learning_rate_runs_training_and_what_follows(finished: Path) -> None:
    steps = json_of("plan", SMOKE, "--set", "sft.learning_rate=0.001")["steps"]
    first = next(n for n, step in enumerate(steps) if not step["cached"])
    assert (steps[first]["step"], steps[first]["iteration"], steps[first]["why"]) == ("train_sft", 1, "not done yet")
    assert {step["step"] for step in steps[:first]} >= {"load_prompts", "gather_rollouts", "select_demonstrations"}


def test_a_plan_tells_its_config_steps_and_first_prompts_to_programs(ratchet_home: Path) -> None:
    told = json_of("plan", SMOKE)
    assert told["config"]["experiment"] == "rest-em-smoke"
    assert set(told["steps"][0]) == {"step", "iteration", "cached", "why", "rows", "reads", "estimate"}
    assert {name: value for name, value in told["steps"][0].items() if name != "estimate"} == {
        "step": "load_prompts", "iteration": None, "cached": False, "why": "not done yet", "rows": 60, "reads": "",
    }  # fmt: skip
    assert set(told["first_prompts"]) == {"base", "trained policies", "evaluation on dev", "evaluation on test"}


@pytest.mark.flow
def test_a_run_prints_its_steps_its_tables_and_its_report(ratchet_home: Path, smoke_run: Path) -> None:
    done = ratchet("run", SMOKE, "--no-prefect-server")
    assert done.exit_code == 0, done.output
    assert "Running without a Prefect server" in done.stderr
    assert "select_demonstrations" in done.stderr
    for shown in ("Accuracy on the test split", "What became of the rollouts", "iteration 2", "dpo", "promoted"):
        assert shown in done.stdout
    assert f"Report: {ratchet_home}/experiments/rest-em-smoke/report.html" in done.stdout
    assert (ratchet_home / "experiments/rest-em-smoke/report.html").is_file()
    assert not (ratchet_home / "prefect").exists()


@pytest.mark.flow
def test_a_run_can_be_done_twice_in_one_process(finished: Path) -> None:
    before = stored(Experiment("rest-em-smoke"))
    for _ in range(2):
        assert ratchet("run", SMOKE, "--no-prefect-server").exit_code == 0
    assert stored(Experiment("rest-em-smoke")) == before


@pytest.mark.flow
def test_a_model_that_knows_nothing_ends_the_run_with_what_it_wrote(ratchet_home: Path) -> None:
    done = ratchet("run", SMOKE, "--no-prefect-server", "--set", "base.name=fake:0.0")
    assert done.exit_code == 1
    assert "The run failed: step 'select_demonstrations' kept 0 of 160 rollouts (" in done.stderr
    assert "mismatch" in done.stderr
    assert "see datasets/scored/" in done.stderr
    assert "What is done is kept; go on with:" in done.stderr
    assert f"ratchet run {SMOKE} --set base.name=fake:0.0 --no-prefect-server" in done.stderr
    assert Experiment("rest-em-smoke").state().state == "failed"


def test_two_runs_of_one_experiment_never_write_at_once(ratchet_home: Path) -> None:
    from storage.locks import exclusive

    with exclusive("experiment-rest-em-smoke", wait_seconds=0):
        done = ratchet("run", SMOKE, "--no-prefect-server")
    assert done.exit_code == 1
    assert "'experiment-rest-em-smoke' is locked by process" in done.stderr


def test_the_status_of_an_empty_home_says_how_to_start(ratchet_home: Path) -> None:
    done = ratchet("status")
    assert (done.exit_code, ratchet_home.exists()) == (0, False)
    assert "no experiment in" in done.stdout
    assert json_of("status") == []


def test_the_status_is_told_to_people_and_to_programs(finished: Path) -> None:
    done = ratchet("status")
    for shown in ("rest-em-smoke: finished", "iteration 2", "mean@1", "train_sft"):
        assert shown in done.stdout
    (told,) = json_of("status")
    assert (told["experiment"], told["state"]) == ("rest-em-smoke", "finished")
    assert {"iteration", "policy", "promoted", "metrics", "funnel"} <= set(told["iterations"][1])
    assert {"value", "low", "high", "n"} <= set(told["iterations"][1]["metrics"]["mean@1"])
    assert {"step", "iteration", "shard", "state", "cached", "rows", "digest", "seconds"} <= set(told["steps"][0])
    assert json_of("status", "rest-em-smoke") == [told]


def test_an_unknown_experiment_is_answered_with_those_there_are(finished: Path) -> None:
    for command in ("status", "report"):
        done = ratchet(command, "words")
        assert done.exit_code == 2
        assert "there is no experiment 'words' in" in done.stderr
        assert "there are: rest-em-smoke" in done.stderr


def test_a_report_is_written_again(finished: Path) -> None:
    page = finished / "experiments/rest-em-smoke/report.html"
    page.unlink(missing_ok=True)
    done = ratchet("report", "rest-em-smoke")
    assert done.exit_code == 0
    assert str(page) in done.stdout.replace("\n", "")
    assert page.is_file()


@pytest.mark.parametrize("short", [False, True], ids=["by name", "by the beginning of its digest"])
def test_a_data_set_is_shown_with_its_first_rows(short: bool, finished: Path) -> None:
    ref = Experiment("rest-em-smoke").iterations()[1].references["scored"]
    told = json_of("show", ref["digest"][:8] if short else f"datasets/scored/{ref['digest']}", "--rows", "2")
    assert (told["kind"], told["whole"], told["damage"], told["ref"]) == ("data set", True, None, ref)
    assert [row["rollout_index"] for row in told["first_rows"]] == [0, 1]


def test_a_model_is_shown(finished: Path) -> None:
    policy = Experiment("rest-em-smoke").iterations()[1].policy
    told = json_of("show", f"models/{policy['digest']}")
    assert (told["kind"], told["whole"], told["step"]) == ("model", True, "train_sft")


def test_damage_is_shown(finished: Path) -> None:
    ref = Experiment("rest-em-smoke").iterations()[1].references["scored"]
    (finished / f"datasets/scored/{ref['digest']}/part-00000.parquet").unlink()
    told = json_of("show", f"datasets/scored/{ref['digest']}")
    assert told["whole"] is False
    assert "part-00000.parquet is missing" in told["damage"]


@pytest.mark.parametrize("reference", ["zzz", "", "datasets/scored/", "../../etc"])
def test_a_reference_to_nothing_or_to_too_much_is_told(reference: str, finished: Path) -> None:
    done = ratchet("show", reference)
    assert done.exit_code == 2
    assert "data sets and models in" in done.stderr


def test_the_doctor_looks_and_changes_nothing(ratchet_home: Path) -> None:
    done = ratchet("doctor", "--json")
    findings = json.loads(done.stdout)
    assert all(set(finding) == {"good", "text"} for finding in findings)
    assert done.exit_code == (0 if all(finding["good"] for finding in findings) else 1)
    assert any(finding["text"].startswith("Python 3.") for finding in findings)
    assert any("can be written" in finding["text"] for finding in findings)
    assert not ratchet_home.exists()
    assert "Python 3." in ratchet("doctor").stdout


def test_a_run_that_halts_at_a_regression_has_an_exit_code_of_its_own_and_goes_on_when_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ("run", SMOKE, "--no-prefect-server", "--set", "gate.regression.stops=every run", "--set", "dpo=null")
    with monkeypatch.context() as patch:
        patch.setattr(fake_engine, "train_fake", train_noised)
        halted = ratchet(*run)
    assert halted.exit_code == 3
    assert "The run halted: rest-em-smoke, iteration 1: Significantly worse: mean@1 fell from" in halted.output
    (told,) = json_of("status", "rest-em-smoke")
    assert (told["state"], told["iterations"][-1]["regression"]["found"]) == ("halted", True)
    assert ratchet(*run).exit_code == 3

    gone_on = ratchet(*run, "--go-on")
    assert gone_on.exit_code == 0, gone_on.output
    assert "Let pass: iteration 1" in gone_on.output
    assert ratchet(*run).exit_code == 0  # for good
    assert Experiment("rest-em-smoke").state().state == "finished"


def test_there_may_be_nothing_to_let_pass() -> None:
    done = ratchet("run", SMOKE, "--no-prefect-server", "--go-on", "--set", "iterations=1", "--set", "dpo=null")
    assert done.exit_code == 0, done.output
    assert "Let pass: nothing: there is no regression on record" in done.output


def test_too_many_suspect_gold_answers_halt_the_run_before_anything_is_trained(tmp_path: Path) -> None:
    # The policy adds without a fault; 10 of 40 gold answers are too large by one.
    rows = [(f"What is {n} + 1?", str(n + 1 + (n % 4 == 0))) for n in range(40)]
    wrong = train_rows(*rows)(tmp_path)
    options = ["base.name=fake:0.95", *wrong, "suspicion.most_suspect_share=0.2", "sampling.rollouts_per_prompt=8"]
    halted = ratchet("run", SMOKE, "--no-prefect-server", *(part for one in options for part in ("--set", one)))
    assert halted.exit_code == 3
    assert re.search(r"10 of the \d+ prompts with a confident majority are contradicted by it", halted.output)
    shown = re.findall(r"gold '(\d+)', but \d+ % of \d rollouts say '(\d+)': 'What is (\d+) \+ 1\?'", halted.output)
    assert [(int(gold) - int(said), int(said) - int(asked)) for gold, said, asked in shown] == [(1, 1)] * 3
    steps = {record.step for record in Experiment("rest-em-smoke").steps()}
    assert "check_gold" in steps and not steps & {"select_demonstrations", "train_sft"}
