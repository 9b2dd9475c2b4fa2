"""Figures of benchmarks, worked out by hand."""

from typing import Any

import pytest
from pydantic import ValidationError

from storage.rows import BenchmarkSample
from tasks.benchmarks import KNOWN, Benchmark, Benchmarks, changes, figures, weighted_mean


def sample(
    values: dict[str, float], *, task: str = "gsm8k", benchmark: str | None = None, document: int = 0, **changes: object
) -> BenchmarkSample:
    fields: dict[str, object] = {
        "benchmark": benchmark or task,
        "task": task,
        "document": document,
        "filter": "none",
        "roles": ["user"],
        "contents": ["?"],
        "continuations": [],
        "logprobs": [],
        "completions": ["!"],
        "answers": ["!"],
        "target": "!",
        "metrics": list(values),
        "values": list(values.values()),
        "weights": [1] * len(values),
        "cut_tokens": 0,
        "documents": 1319,
        "limit": 4,
        "shots": 5,
        "policy": "tests",
    }
    return BenchmarkSample(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_limited_figure_says_of_how_many_documents_it_is() -> None:
    rows = [sample({"exact_match": value}, document=n) for n, value in enumerate([1.0, 0.0, 1.0, 1.0])]
    (figure,) = figures(rows)
    assert (figure.value, figure.n, figure.documents, figure.limit, figure.shots) == (0.75, 4, 1319, 4, 5)
    # Wilson for 3 of 4 with z 1.96: centre (0.75 + 3.8415/8) / 1.9604 = 0.6275, half width 0.3269.
    assert (figure.low, figure.high) == pytest.approx((0.3006, 0.9544), abs=1e-3)


def test_each_filter_and_metric_has_a_figure_of_its_own() -> None:
    rows = [
        sample({"exact_match": 0.0}, filter="strict-match"),
        sample({"exact_match": 1.0}, filter="flexible-extract"),
    ]
    assert [(figure.filter, figure.value) for figure in figures(rows)] == [
        ("strict-match", 0.0),
        ("flexible-extract", 1.0),
    ]


def test_every_document_of_a_group_weighs_the_same() -> None:
    astronomy = [sample({"acc": 1.0}, task="mmlu_astronomy", benchmark="mmlu", document=n) for n in range(3)]
    virology = [sample({"acc": 0.0}, task="mmlu_virology", benchmark="mmlu", documents=81)]
    found = {figure.task: figure for figure in figures([*astronomy, *virology])}
    assert list(found) == ["mmlu", "mmlu_astronomy", "mmlu_virology"]
    assert (found["mmlu"].value, found["mmlu"].n, found["mmlu"].documents) == (0.75, 4, 1319 + 81)
    assert (found["mmlu_astronomy"].value, found["mmlu_astronomy"].n) == (1.0, 3)


def test_instructions_are_averaged_over_all_prompts() -> None:
    # one of one instruction followed, and one of three: 2 of 4
    rows = [sample({"inst": 1.0}, weights=[1]), sample({"inst": 1 / 3}, weights=[3], document=1)]
    (figure,) = figures(rows)
    assert (figure.value, figure.n) == (0.5, 2)
    assert figure.low < 0.5 < figure.high


def test_an_interval_over_prompts_is_wider_where_their_instructions_agree() -> None:
    prompts = [(1.0, 4), (0.0, 4)] * 20 + [(1.0, 2)]
    together = weighted_mean([value for value, _ in prompts], [weight for _, weight in prompts])[1]
    mixed = weighted_mean([0.5] * 40 + [1.0], [4] * 40 + [2])[1]
    assert together.high - together.low > 3 * (mixed.high - mixed.low)


def test_a_figure_without_spread_keeps_an_interval() -> None:
    value, interval = weighted_mean([1.0, 1.0, 1.0], [1, 2, 3])
    # 3 of 3 by Wilson: low = 1 / (1 + 3.8415 / 3) = 0.4385
    assert value == 1.0 and (interval.low, interval.high) == pytest.approx((0.4385, 1.0), abs=1e-3)


def test_plain_text_and_prompts_that_were_cut_are_told() -> None:
    (figure,) = figures([sample({"acc": 1.0}, roles=["plain"], cut_tokens=7)], note="a note")
    assert (figure.rendering, figure.cut_prompts, figure.note) == ("plain", 1, "a note")


def test_shots_are_the_usual_ones_unless_told() -> None:
    assert [Benchmark(task="gsm8k").shots_used, Benchmark(task="gsm8k", shots=0).shots_used] == [5, 0]
    assert set(KNOWN) == set(Benchmark.model_fields["task"].annotation.__args__)  # type: ignore[union-attr]


def test_shots_of_a_benchmark_that_fixes_them_are_refused() -> None:
    with pytest.raises(ValidationError, match="ifeval is defined with 0 shots and 3 were asked for"):
        Benchmark(task="ifeval", shots=3)


def test_a_benchmark_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="gsm8k stands there more than once"):
        Benchmarks(tasks=(Benchmark(task="gsm8k"), Benchmark(task="gsm8k", limit=3)))


def test_a_drop_is_seen_with_its_paired_interval() -> None:
    base = [sample({"acc": 1.0}, document=n) for n in range(100)]
    candidate = [sample({"acc": float(n >= 12)}, document=n) for n in range(100)]
    (change,) = changes(candidate, base)
    assert (change.difference, change.n) == (pytest.approx(-0.12), 100)
    assert -0.20 < change.low < -0.12 < change.high < -0.04  # 12 of 100 lost: -0.12, standard error 0.032


def test_a_change_counts_instructions_not_prompts() -> None:
    base = [sample({"inst": 1.0}, weights=[1]), sample({"inst": 0.0}, weights=[3], document=1)]
    candidate = [sample({"inst": 0.0}, weights=[1]), sample({"inst": 1.0}, weights=[3], document=1)]
    (change,) = changes(candidate, base)
    assert change.difference == pytest.approx((3 - 1) / 4)


@pytest.mark.parametrize("other", [{"shots": 0}, {"roles": ["plain"]}, {"document": 9}, {"filter": "strict-match"}])
def test_figures_of_other_documents_or_shots_are_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of 1 and 1 answers 0 are alike"):
        changes([sample({"acc": 1.0}, **other)], [sample({"acc": 1.0})])
