"""What a judge's answers come to, and what becomes of pairs by margin; expected figures are worked by hand."""

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from storage.rows import Comparison, Pair
from tasks import comparisons as rules
from tasks.asks import PairwiseAsk, ScoresAsk
from tasks.comparisons import Labelling, Verdict
from tasks.pairs import pair_with_gold
from tests.tasks.builders import demonstration, rollout


def pair(prompt_id: str = "p", margin: float | None = None, rejected_index: int = 0) -> Pair:
    made = pair_with_gold(demonstration(prompt_id), [rollout(rejected_index, prompt_id=prompt_id)], 1).pairs[0]
    return replace(made, margin=margin)


def comparison(margin: float | None, prompt_id: str = "p", reason: str = "judged") -> Comparison:
    chosen = None if margin is None else 0.5 + margin / 2
    return Comparison(
        prompt_id=prompt_id,
        rejected_index=0,
        chosen_reward=chosen,
        rejected_reward=None if chosen is None else 1 - chosen,
        margin=margin,
        reason=reason,
        judge="fake:judge",
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Chosen first: 0.9 for it. Chosen second: 0.2 for the other, so 0.8 for it. Together 0.85.
        pytest.param(0.9, 0.2, Verdict(0.85, 0.15, "judged"), id="both orders for the chosen"),
        pytest.param(0.3, 0.9, Verdict(0.2, 0.8, "judged"), id="both orders for the rejected"),  # (0.3 + 0.1) / 2
        pytest.param(0.9, 0.8, Verdict(0.5, 0.5, "orders disagree"), id="always the first is a tie"),
        pytest.param(0.1, 0.3, Verdict(0.5, 0.5, "orders disagree"), id="always the second is a tie"),
        pytest.param(0.9, None, Verdict(None, None, "no label"), id="one order undecided"),
    ],
)
def test_both_orders_are_averaged_and_disagreement_is_a_tie(
    first: float, second: float | None, expected: Verdict
) -> None:
    told = rules.both_orders(first, second)
    assert told.reason == expected.reason
    if expected.chosen is None:
        assert told[:2] == (None, None)
    else:
        assert told[:2] == (pytest.approx(expected.chosen), pytest.approx(expected.rejected))


@pytest.mark.parametrize(
    ("written", "score"),
    [
        pytest.param("Score: 7", 0.7, id="as asked"),
        pytest.param("Score: 3 at first, but then\nscore: 8.5", 0.85, id="the last one counts"),
        pytest.param("9", 0.9, id="a number alone"),
        pytest.param("Score: 11", None, id="out of range"),
        pytest.param("Score: -1", None, id="below zero"),
        pytest.param("I would say 7 of 10.", None, id="another form"),
        pytest.param("", None, id="nothing"),
    ],
)
def test_a_score_is_read_from_what_the_judge_writes_or_is_unknown(written: str, score: float | None) -> None:
    assert rules.read_score(ScoresAsk(), written) == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("written", "share"),
    [("A", 1.0), (" B.", 0.0), ("A or B", None), ("Neither", None), ("Because", None), ("The better one: B", 0.0)],
)
def test_a_choice_is_read_as_a_word_of_its_own(written: str, share: float | None) -> None:
    assert rules.read_choice(PairwiseAsk(), written) == share


def test_the_share_of_the_first_label_needs_some_mass_on_the_two() -> None:
    asks = PairwiseAsk(minimum_label_mass=0.1)
    assert rules.share_of_first(asks, math.log(0.3), math.log(0.1)) == pytest.approx(0.75)
    assert rules.share_of_first(asks, math.log(0.05), math.log(0.04)) is None
    assert rules.share_of_first(asks, -math.inf, -math.inf) is None


def test_reward_model_scores_become_the_chance_to_be_preferred() -> None:
    assert rules.bradley_terry(2.0, 2.0 - math.log(3), "too long")[:2] == (pytest.approx(0.75), pytest.approx(0.25))
    assert rules.bradley_terry(-2000.0, 2000.0, "too long")[0] == pytest.approx(0.0)
    assert rules.bradley_terry(1.0, None, "too long") == (None, None, "too long")


@pytest.mark.parametrize(
    ("margin", "bucket"),
    [
        (None, "undecided"),
        (0.0, "small margin"),
        (0.09, "small margin"),
        (-0.09, "small margin"),
        (0.1, "gold better"),
        (-0.1, "between"),
        (-0.49, "between"),
        (-0.5, "own better"),
        (-1.0, "own better"),
    ],
)
def test_the_adaptive_rule_sorts_pairs_into_buckets(margin: float | None, bucket: str) -> None:
    assert rules.bucket_of(margin, Labelling()) == bucket  # swap at 0.5, small below 0.1


def test_a_tie_is_small_even_where_no_margin_is_and_nothing_is_swapped_without_a_threshold() -> None:
    assert rules.bucket_of(0.0, Labelling(small_below=0.0)) == "small margin"
    assert rules.bucket_of(-1.0, Labelling(swap_at=None)) == "between"


def test_pairs_are_kept_swapped_or_dropped_and_every_drop_is_counted() -> None:
    names = ["gold", "small", "between", "own", "undecided"]
    pairs = [pair(name) for name in names]
    margins = [0.6, 0.05, -0.3, -0.7, None]
    compared = [comparison(margin, name) for margin, name in zip(margins, names, strict=True)]
    told = rules.relabel_pairs(pairs, compared, Labelling(undecided="drop"))
    assert [one.prompt_id for one in told.pairs] == ["gold", "small", "own"]
    assert dict(told.drops) == {"judged: between": 1, "judged: undecided": 1}
    kept, _, swapped = told.pairs
    assert (kept.chosen, kept.chosen_reward, kept.margin, kept.swapped) == ("human", pytest.approx(0.8), 0.6, False)
    assert (swapped.chosen, swapped.rejected, swapped.swapped) == ("mine", "human", True)
    assert (swapped.chosen_reward, swapped.margin) == (pytest.approx(0.85), pytest.approx(0.7))


@pytest.mark.parametrize("between", ["keep", "swap"])
def test_what_lies_between_is_a_knob(between: str) -> None:
    labelling = Labelling.model_validate({"between": between})
    (left,) = rules.relabel_pairs([pair()], [comparison(-0.3)], labelling).pairs
    assert left.swapped is (between == "swap")


def test_verdicts_on_other_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="judge the same pairs"):
        rules.relabel_pairs([pair("a")], [comparison(0.1, "b")], Labelling())


def test_a_threshold_that_would_swap_small_margins_is_refused() -> None:
    with pytest.raises(ValidationError, match="a small margin would be swapped"):
        Labelling(swap_at=0.05, small_below=0.1)


def test_the_flip_rate_is_of_decided_pairs_and_stays_clear_of_one_half() -> None:
    margins = [0.5, 0.5, 0.5, -0.5, 0.01, None]  # the last two are a tie and an unknown: 1 of 4
    assert rules.flip_rate([pair(margin=margin) for margin in margins], 0.1) == 0.25
    assert rules.flip_rate([pair(margin=-0.5)], 0.1) == 0.45
    with pytest.raises(ValueError, match="is there a judge"):
        rules.flip_rate([pair(margin=None)], 0.1)


def test_lengths_and_labels_are_told_as_figures() -> None:
    told = {row.name: row.value for row in rules.lengths("chosen", [2, 4, 6, 8])}
    assert told["tokens, mean"] == 5
    assert told["tokens, median"] == 5
    assert told["tokens, longest"] == 8
    compared = [comparison(-0.7), comparison(0.05), comparison(0.0, reason="orders disagree"), comparison(None)]
    left = [replace(pair(margin=0.7), swapped=True), pair(margin=0.05), pair(margin=0.0)]
    figures = {
        (row.about, row.name): (row.value, row.n) for row in rules.label_figures(left, compared, Labelling(), 0.1)
    }
    assert figures["judged", "own better"] == (1, 4)
    assert figures["judged", "small margin"] == (2, 4)
    assert figures["judged", "undecided"] == (1, 4)
    assert figures["judged", "orders disagree"] == (1, 4)
    assert figures["pairs", "swapped"] == (1, 3)
    assert figures["pairs", "noised"] == (2, 3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"text": "$prompt $first"}, "is to hold \\$first, \\$prompt, \\$second"),
        ({"first": "A", "second": "AB"}, "one begins the other"),
    ],
)
def test_a_pairwise_judge_that_cannot_be_asked_is_refused(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PairwiseAsk.model_validate(settings)
