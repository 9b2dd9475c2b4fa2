"""Benchmarks as steps, on the fake engine: lm-eval itself builds, reads and scores."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from models import harness
from models.engine import EngineError
from models.ifeval_libraries import STAND_IN, BenchmarkError, prepare_ifeval
from models.specs import Fake, ModelRef, PromptTemplate
from storage.benchmark_files import local_splits
from storage.datasets import read_rows
from storage.rows import BenchmarkMetric, BenchmarkSample
from tasks.benchmarking import (
    Part,
    answer_benchmark,
    benchmark_faults,
    evaluate_benchmark,
    evaluate_benchmarks,
    material_of,
)
from tasks.benchmarks import KNOWN, Benchmark, Benchmarks
from tasks.planning import planning
from tests.benchmark_documents import write_documents

pytestmark = pytest.mark.flow  # lm-eval takes seconds to import

POLICY = ModelRef(name="fake:0.4")
SPOKEN = PromptTemplate(system="Be brief.", user="Say: $prompt")


@pytest.fixture(autouse=True)
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_documents(tmp_path / "documents")
    monkeypatch.setenv("RATCHET_DATA", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is downloaded here, neither documents nor NLTK's model
    return root


def answered(benchmark: Benchmark, template: PromptTemplate = SPOKEN) -> list[BenchmarkSample]:
    return list(read_rows(evaluate_benchmark(POLICY, template, benchmark, Fake()), BenchmarkSample))


def test_documents_are_put_through_the_recipes_own_template() -> None:
    first = answered(Benchmark(task="gsm8k", shots=1, limit=2))[0]
    assert first.roles == ["system", "user", "assistant", "user"]
    assert first.contents[0] == "Be brief."
    assert first.contents[1].startswith("Say: Question: Ann has")
    assert first.contents[3] == "Say: Question: Ann has 6 coins and finds 2 more. How many has she?\nAnswer:"
    assert [first.target[-1], first.shots, first.limit, first.documents] == ["8", 1, 2, 8]


def test_a_benchmarks_own_introduction_stands_behind_the_recipes() -> None:
    benchmark = Benchmark(task="mmlu", shots=1, limit=1)
    _write_every_subject(benchmark)
    first = answered(benchmark)[0]
    assert first.roles == ["system", "user", "assistant", "user"]
    assert first.contents[0].startswith("Be brief.\n\nThe following are multiple choice questions")
    assert first.continuations == ["A", "B", "C", "D"] and len(first.logprobs) == 4


def test_a_group_goes_on_with_the_task_that_it_broke_off_at(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = Benchmark(task="mmlu", shots=0, limit=1)
    _write_every_subject(benchmark)
    asked: list[str] = []
    run_task = harness.run_task

    def broken_once(task: harness.TaskToRun, *others: Any) -> list[harness.Answer]:
        asked.append(task.name)
        if len(asked) == 3:
            raise EngineError("the engine died")
        return run_task(task, *others)

    monkeypatch.setattr(harness, "run_task", broken_once)
    with pytest.raises(EngineError):
        answered(benchmark)
    rows = answered(benchmark)
    assert asked[2] == asked[3] and len(asked) == len(set(asked)) + 1 == 58
    assert [row.task for row in rows] == sorted({row.task for row in rows}) and len(rows) == 57


def _write_every_subject(benchmark: Benchmark) -> None:
    import os

    known = KNOWN[benchmark.task]
    names = harness.task_names(known.folder, "mmlu_")
    assert len(names) == 57
    write_documents(Path(os.environ["RATCHET_DATA"]), [name.removeprefix("mmlu_") for name in names])


def test_plain_text_has_no_template_around_it() -> None:
    first = answered(Benchmark(task="arc_easy", limit=2, use_chat_template=False))[0]
    assert (first.roles, first.contents) == (["plain"], ["Question: What is a lamp?\nAnswer:"])
    assert first.continuations[0] == " a planet"


def test_both_readings_of_gsm8k_are_figured() -> None:
    benchmarks = Benchmarks(tasks=(Benchmark(task="gsm8k", shots=0, limit=4), Benchmark(task="winogrande", limit=3)))
    metrics = list(read_rows(evaluate_benchmarks(POLICY, SPOKEN, benchmarks, Fake()), BenchmarkMetric))
    assert [(metric.task, metric.metric, metric.filter, metric.n) for metric in metrics] == [
        ("gsm8k", "exact_match", "strict-match", 4),
        ("gsm8k", "exact_match", "flexible-extract", 4),
        ("winogrande", "acc", "none", 3),
    ]


def test_all_four_accuracies_of_ifeval_are_figured_and_a_missing_sentence_model_is_told() -> None:
    pytest.importorskip("langdetect", reason="IFEval needs langdetect: pip install 'lm-eval[ifeval]'")
    benchmarks = Benchmarks(tasks=(Benchmark(task="ifeval"),))
    metrics = {
        metric.metric: metric
        for metric in read_rows(evaluate_benchmarks(POLICY, SPOKEN, benchmarks, Fake()), BenchmarkMetric)
    }
    assert list(metrics) == [
        "prompt_level_strict_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_loose_acc",
    ]
    # Asked for no sum, the engine writes "I do not know.\nFINAL ANSWER: unknown": two sentences without a comma.
    # Prompts 0 to 3 ask for at least 1, 2, 3 and 4 sentences, 1 and 3 for no comma too: 2 of 4 prompts are followed,
    # and 4 of 6 instructions.
    assert metrics["prompt_level_strict_acc"].value == 2 / 4
    assert metrics["inst_level_strict_acc"].value == pytest.approx(4 / 6)
    assert ("punkt_tab" in metrics["inst_level_strict_acc"].note) is (
        prepare_ifeval([], may_download=False) == STAND_IN
    )


def test_an_answered_benchmark_is_not_answered_again() -> None:
    benchmark = Benchmark(task="hellaswag", shots=2, limit=3)
    first = evaluate_benchmark(POLICY, SPOKEN, benchmark, Fake())
    part = Part(task="hellaswag", config=None)
    material = material_of(benchmark, part)
    assert answer_benchmark.lookup(POLICY, SPOKEN, benchmark, part, material, Fake()).found is not None
    assert evaluate_benchmark(POLICY, SPOKEN, benchmark, Fake()) == first


def test_other_documents_are_another_benchmark(documents: Path) -> None:
    benchmark = Benchmark(task="arc_easy", limit=2)
    part = Part(task="arc_easy", config="ARC-Easy")
    before = material_of(benchmark, part)
    file = documents / "ai2_arc" / "ARC-Easy" / "test.jsonl"
    file.write_text(file.read_text().replace("lamp", "lantern"))
    assert material_of(benchmark, part) != before


def test_documents_that_are_nowhere_are_asked_for_by_name(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RATCHET_DATA", str(documents / "elsewhere"))
    wanted = r"'winogrande' are neither on this machine.*<RATCHET_DATA>/winogrande/winogrande_xl/<split>\.jsonl"
    with pytest.raises(BenchmarkError, match=wanted):
        answered(Benchmark(task="winogrande"))


def test_a_split_that_is_missing_is_named(documents: Path) -> None:
    (documents / "gsm8k" / "train.jsonl").unlink()
    assert len(answered(Benchmark(task="gsm8k", shots=0, limit=2))) == 4  # two filters
    with pytest.raises(BenchmarkError, match=r"needs the split 'train'.*there are: test; put train\.jsonl"):
        answered(Benchmark(task="gsm8k", shots=2, limit=2))


def test_a_document_of_another_form_is_refused(documents: Path) -> None:
    file = documents / "truthful_qa" / "multiple_choice" / "validation.jsonl"
    file.write_text(json.dumps({"question": "What?", "mc1_targets": {"labels": [1]}}) + "\n")
    with pytest.raises(BenchmarkError, match="'truthfulqa_mc1': a document is not as the hub's data set has it"):
        answered(Benchmark(task="truthfulqa_mc1"))


def test_a_library_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "langdetect" else name)
    wanted = r"IFEval needs langdetect.*pip install 'ratchet-lm\[evaluation\]'"
    with pytest.raises(BenchmarkError, match=wanted):
        prepare_ifeval([], may_download=False)
    (fault,) = benchmark_faults(Benchmarks(tasks=(Benchmark(task="ifeval"),)))
    assert re.match(wanted, fault)


def test_faults_are_found_before_anything_is_run(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faults(**settings: object) -> list[str]:
        return benchmark_faults(Benchmarks(tasks=(Benchmark.model_validate(settings),)))

    assert faults(task="gsm8k") == []
    (documents / "gsm8k" / "train.jsonl").unlink()
    assert faults(task="gsm8k", shots=0) == []
    assert "without its split train (there are: test)" in faults(task="gsm8k")[0]
    monkeypatch.setenv("RATCHET_DATA", str(documents / "elsewhere"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert faults(task="hellaswag") == []  # the hub's
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "put its splits validation, train at <RATCHET_DATA>/hellaswag/<split>.jsonl" in faults(task="hellaswag")[0]


def test_files_are_found_by_the_whole_id_and_as_the_hub_names_them(documents: Path) -> None:
    folder = documents / "Rowan" / "hellaswag"
    folder.mkdir(parents=True)
    (folder / "validation-00000-of-00001.parquet").touch()
    found = local_splits("Rowan/hellaswag", None, config_optional=True)
    assert found == {"validation": folder / "validation-00000-of-00001.parquet"}


def test_a_plan_counts_the_benchmarks_and_runs_none() -> None:
    benchmarks = Benchmarks(tasks=(Benchmark(task="gsm8k", shots=0), Benchmark(task="winogrande", shots=0)))
    with planning() as planned:
        evaluate_benchmarks(POLICY, SPOKEN, benchmarks, Fake())
    assert [(one.step, one.cached) for one in planned] == [
        ("answer_benchmark", False),
        ("answer_benchmark", False),
        ("summarise_benchmarks", False),
    ]
