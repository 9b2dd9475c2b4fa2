"""The gate: what is promoted, and what its sentence says."""

from dataclasses import replace
from typing import Literal

import pytest

from storage.rows import EvaluatedPrompt
from tasks.promotion import Gate, Regression, decide, find_regression, hold_to_benchmarks
from tests.tasks.builders import evaluated


def policy(*values: float) -> list[EvaluatedPrompt]:
    return [evaluated(f"p{n}", value) for n, value in enumerate(values)]


WEAK, STRONG = policy(*[0.0] * 10), policy(*[1.0] * 5, *[0.0] * 5)  # five gains, no loss: p = 1/32
SLIGHTLY = policy(1.0, *[0.0] * 9)  # one gain: p = 1/2


@pytest.mark.parametrize(
    ("promote", "candidate", "incumbent", "promoted"),
    [
        pytest.param("better", STRONG, WEAK, True, id="better: five gains"),
        pytest.param("better", SLIGHTLY, WEAK, False, id="better: one gain may be chance"),
        pytest.param("better", WEAK, STRONG, False, id="better: a loss"),
        pytest.param("better", STRONG, STRONG, False, id="better: no difference"),
        pytest.param("not_worse", STRONG, STRONG, True, id="not worse: no difference"),
        pytest.param("not_worse", WEAK, SLIGHTLY, False, id="not worse: ten points lost"),
        pytest.param("always", WEAK, STRONG, True, id="always"),
    ],
)
def test_gate(
    promote: Literal["better", "not_worse", "always"],
    candidate: list[EvaluatedPrompt],
    incumbent: list[EvaluatedPrompt],
    promoted: bool,
) -> None:
    assert decide(candidate, incumbent, Gate(promote=promote)).promoted is promoted


def test_drop_of_just_what_is_allowed_passes() -> None:
    # 100 prompts at 0.5 against 0.49: a drop of one point, the default maximum
    assert decide(policy(*[0.49] * 100), policy(*[0.5] * 100), Gate(promote="not_worse")).promoted


def test_sentence_can_stand_in_a_report() -> None:
    decision = decide(STRONG, WEAK, Gate())
    assert decision.reason.startswith(
        "Promoted: mean@1 went from 0.0 % to 50.0 % on the same 10 prompts, +50.0 points (95 % "
    )
    assert decision.reason.endswith("one-sided p = 0.031); p below 0.05 and a rise are asked for.")
    assert (decision.difference, decision.p_value, decision.n) == (0.5, 1 / 32, 10)
    assert decide(SLIGHTLY, WEAK, Gate()).reason.startswith("Not promoted: mean@1 went from 0.0 % to 10.0 %")


def test_prompts_are_joined_by_id_and_never_by_position() -> None:
    assert decide(STRONG[::-1], WEAK, Gate()) == decide(STRONG, WEAK, Gate())


def test_other_strategies_are_left_out() -> None:
    greedy = [evaluated(row.prompt_id, 1.0, "greedy") for row in WEAK]
    assert decide([*STRONG, *greedy], WEAK, Gate()) == decide(STRONG, WEAK, Gate())


def test_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="the candidate has 9 and the incumbent 10, of which 9 are shared"):
        decide(STRONG[:9], WEAK, Gate())


@pytest.mark.parametrize("rows", [[], [*STRONG, STRONG[0]], [evaluated("p0", 1.0, "greedy")]])
def test_missing_strategy_or_repeated_prompt_is_refused(rows: list[EvaluatedPrompt]) -> None:
    with pytest.raises(ValueError, match=r"one 'mean@1' row a prompt of the candidate; found"):
        decide(rows, WEAK, Gate())


@pytest.mark.parametrize(
    ("after", "allowed", "promoted"),
    [
        pytest.param({"mmlu (5)": 4, "gsm8k (5)": 9}, 0.1, False, id="one of two fell by 20 points"),
        pytest.param({"mmlu (5)": 5, "gsm8k (5)": 9}, 0.1, True, id="just what is allowed"),
        pytest.param({"mmlu (5)": 7, "gsm8k (5)": 0}, 1.0, True, id="anything is allowed"),
    ],
)
def test_a_drop_of_any_benchmark_turns_a_policy_down(after: dict[str, int], allowed: float, promoted: bool) -> None:
    def documents(right: dict[str, int]) -> list[EvaluatedPrompt]:
        return [evaluated(f"d{n}", float(n < count), name) for name, count in right.items() for n in range(10)]

    decision = decide(STRONG, WEAK, Gate())
    held = hold_to_benchmarks(decision, documents(after), documents({"mmlu (5)": 6, "gsm8k (5)": 5}), allowed)
    assert held.promoted is promoted
    assert held.difference == decision.difference
    if not promoted:  # 6 of 10 before, 4 of 10 after
        assert held.reason.startswith("Not promoted: mmlu (5) went from 60.0 % to 40.0 % of 10 documents, -20.0 points")
        assert "Otherwise: mean@1 went from" in held.reason


def test_a_policy_that_was_turned_down_anyway_stays_so() -> None:
    same = [evaluated("d", 1.0, "mmlu (5)")]
    assert not hold_to_benchmarks(decide(SLIGHTLY, WEAK, Gate()), same, same, 0.1).promoted
    with pytest.raises(ValueError, match="use the same limits"):
        hold_to_benchmarks(decide(STRONG, WEAK, Gate()), same, [evaluated("e", 1.0, "mmlu (5)")], 0.1)


@pytest.mark.parametrize(
    ("fell", "found"),
    # Of n differing prompts all are worse: one-sided p = 1 / 2^n. 1/64 = 0.016 and 1/128 = 0.008 with alpha 0.01
    [pytest.param(6, False, id="six of ten fell"), pytest.param(7, True, id="seven of ten fell")],
)
def test_a_fall_that_may_be_chance_is_no_regression(fell: int, found: bool) -> None:
    before, after = policy(*[1.0] * 10), policy(*[0.0] * fell, *[1.0] * (10 - fell))
    fall = find_regression(after, before, Gate())
    assert (fall.found, fall.p_value, fall.fell, fall.rose) == (found, 1 / 2**fell, fell, 0)


def test_a_rise_is_no_regression() -> None:
    assert not find_regression(STRONG, WEAK, Gate(regression=Regression(alpha=0.9))).found


def test_a_fall_no_larger_than_allowed_is_no_regression() -> None:
    before, after = policy(*[1.0] * 10), policy(*[0.0] * 8, *[1.0] * 2)
    assert find_regression(after, before, Gate(regression=Regression(minimum_drop=0.7))).found
    assert not find_regression(after, before, Gate(regression=Regression(minimum_drop=0.8))).found


def test_a_regression_is_explained() -> None:
    # Four rollouts a prompt; on the ten that fell, three had no answer: 30 of 48 in all, where 0 of 48 had none before.
    before = policy(*[1.0] * 10, *[0.0] * 2)
    after = [replace(row, undecided=3) for row in policy(*[0.0] * 10)] + policy(*[0.0] * 10, 1.0, 0.0)[10:]
    fall = find_regression(after, before, Gate())
    # 11 prompts differ, ten down and one up: of 2^11 sign patterns, 1 + 11 are as far down
    assert fall.p_value == 12 / 2048
    assert fall.reason == (
        "Significantly worse: mean@1 fell from 83.3 % to 8.3 % on the dev split (one-sided p = 0.0059, below 0.01); 10 "
        "prompts fell and 1 rose; rollouts without an answer to score went from 0.0 % to 62.5 %."
    )


def test_what_stops_at_a_regression_is_in_no_key() -> None:
    assert Gate(regression=None).key() == Gate().key()
    assert Regression(stops="every run").key() == Regression().key() != Regression(alpha=0.02).key()
