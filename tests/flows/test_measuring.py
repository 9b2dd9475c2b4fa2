"""The commands that put stored policies to work outside a run, on the fake engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.__main__ import app
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.rows import BenchmarkMetric, TokenComparison
from tasks.policies import policy_named
from tests.benchmark_documents import write_documents
from tests.flows.builders import SMOKE

pytestmark = pytest.mark.flow  # whole runs on the fake engine

NAME = "rest-em-smoke"


def ratchet(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> Any:
    done = ratchet(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def pairs(home: Path) -> str:
    (folder,) = (home / "datasets" / "pairs").glob("[!.]*")
    return f"datasets/pairs/{folder.name}"


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_documents(tmp_path / "documents")
    monkeypatch.setenv("RATCHET_DATA", str(root))
    return root


def test_a_stored_policy_is_put_through_benchmarks(finished: Path, documents: Path) -> None:
    asked = ("evaluate", SMOKE, "--policy", f"{NAME}:1", "--task", "gsm8k", "--task", "winogrande", "--limit", 3)
    found = json_of(*asked)
    assert [(row["task"], row["filter"], row["n"], row["limit"]) for row in found["rows"]] == [
        ("gsm8k", "strict-match", 3, 3),
        ("gsm8k", "flexible-extract", 3, 3),
        ("winogrande", "none", 3, 3),
    ]
    assert {row["policy"] for row in found["rows"]} == {policy_named(f"{NAME}:1").identity}
    shown = ratchet(*asked)
    assert "3 of 8" in shown.stdout and "chat template" in shown.stdout and found["metrics"] in shown.stdout
    assert "answer_benchmark" in shown.stderr and "cached" in shown.stderr


def test_a_presets_own_benchmarks_are_used(finished: Path, documents: Path) -> None:
    section = "benchmarks={tasks: [{task: arc_easy, limit: 2, use_chat_template: false}]}"
    found = json_of("evaluate", SMOKE, "--policy", NAME, "--set", section)
    digest = found["metrics"].rpartition("/")[2]
    ref = DatasetRef(step="benchmark_metrics", digest=digest, row_type="BenchmarkMetric", rows=len(found["rows"]))
    assert [(row.metric, row.rendering) for row in read_rows(ref, BenchmarkMetric)] == [
        ("acc", "plain"),
        ("acc_norm", "plain"),
    ]


def test_what_cannot_be_evaluated_is_told(finished: Path, documents: Path) -> None:
    none = ratchet("evaluate", SMOKE, "--policy", NAME)
    assert none.exit_code == 2 and "has no `benchmarks` section" in none.stderr
    wrong = ratchet("evaluate", SMOKE, "--policy", NAME, "--task", "gms8k")
    assert wrong.exit_code == 2 and "found 'gms8k'" in wrong.stderr
    (documents / "gsm8k" / "train.jsonl").unlink()
    failed = ratchet("evaluate", SMOKE, "--policy", NAME, "--task", "gsm8k")
    assert failed.exit_code == 2 and "without its split train (there are: test)" in " ".join(failed.stderr.split())


def test_policies_are_named_by_experiment_iteration_and_digest(finished: Path) -> None:
    records = Experiment(NAME).iterations()
    by_iteration = {record.iteration: record.policy for record in records}
    standing = [record.policy for record in records if record.promoted][-1]
    assert policy_named(NAME).model_dump() == standing
    assert policy_named(f"{NAME}:1").model_dump() == by_iteration[1]
    assert policy_named(by_iteration[1]["digest"][:10]).model_dump() == by_iteration[1]
    assert policy_named("fake:0.3").name == "fake:0.3"
    assert policy_named("org/model@abc").key() == {
        "name": "org/model",
        "revision": "abc",
        "adapter": None,
        "chat_template": None,
    }
    for unknown in ("nix", f"{NAME}:9", f"{NAME}:x"):
        with pytest.raises(ValueError, match="names 0 policies"):
            policy_named(unknown)


def test_two_policies_are_compared_on_a_page(finished: Path, tmp_path: Path) -> None:
    rows, page = pairs(finished), tmp_path / "page.html"
    asked = ("view-logprobs", SMOKE, rows, "--policy", NAME, "--reference", f"{NAME}:0")
    found = json_of(*asked, "-n", 2, "--out", page)
    assert f"<code>{NAME}</code>" in page.read_text() and found["page"] == str(page)
    digest = found["tokens"].rpartition("/")[2]
    ref = DatasetRef(step="token_comparisons", digest=digest, row_type="TokenComparison", rows=found["rows"])
    tokens = list(read_rows(ref, TokenComparison))
    assert {(token.sequence, token.side) for token in tokens} == {
        (0, "chosen"),
        (1, "rejected"),
        (2, "chosen"),
        (3, "rejected"),
    }
    default = ratchet(*asked, "-n", 2)
    assert f"views/{digest[:12]}.html" in default.stdout and "cached" in default.stderr
    assert (finished / "views" / f"{digest[:12]}.html").is_file()


def test_rows_that_cannot_be_viewed_are_told(finished: Path) -> None:
    asked = ("view-logprobs", SMOKE, pairs(finished), "--policy", NAME, "--reference", NAME)
    failed = ratchet(*asked, "--row", "zz")
    assert failed.exit_code == 1 and "zz: no row of datasets/pairs/" in " ".join(failed.stderr.split())
    missing = ratchet("view-logprobs", SMOKE, "datasets/pairs/none", "--policy", NAME, "--reference", NAME)
    assert missing.exit_code == 1 and "names 0 data sets" in missing.stderr
