"""Which rollouts are shown in a report."""

from storage.datasets import DatasetRef, write_rows
from storage.rows import ScoredRollout
from tasks.drift import Solved
from tasks.picking import CHARACTERS, OF_A_KIND, PolicyOnTest, changed_samples, first_samples, shown
from tests.tasks.builders import scored


def rollouts(*rows: ScoredRollout) -> DatasetRef:
    return write_rows(rows, ScoredRollout, step="scored")


def test_of_each_kind_a_few_are_shown_each_of_another_prompt() -> None:
    rows = [scored(n, reward, prompt_id=f"p{p}") for p in range(4) for n, reward in enumerate([1.0, 1.0, None])]
    told = [(one.kind, one.prompt_id, one.completion) for one in first_samples(rollouts(*rows), "base")]
    assert OF_A_KIND == 2
    assert told == [
        ("right", "p0", "completion 0"),
        ("right", "p1", "completion 0"),
        ("undecided", "p0", "completion 2"),
        ("undecided", "p1", "completion 2"),
    ]


def test_a_reward_that_is_neither_right_nor_wrong_is_not_shown_as_either() -> None:
    assert list(first_samples(rollouts(scored(0, 0.5)), "base")) == []


def test_of_a_data_set_that_is_gone_nothing_is_shown() -> None:
    gone = DatasetRef(step="scored", digest="f" * 32, row_type="ScoredRollout", rows=3)
    assert list(first_samples(gone, "base")) == []
    tested = PolicyOnTest("base", gone, {"p": Solved(1, 0)})
    assert list(changed_samples(tested, tested._replace(solved={"p": Solved(1, 1)}))) == []


def test_a_prompt_that_improved_shows_what_was_wrong_beside_what_is_right() -> None:
    before = rollouts(scored(0, 1.0, completion="lucky"), scored(1, 0.0, completion="wrong"))
    after = rollouts(scored(0, None, completion="cut"), scored(1, 1.0, completion="right"), scored(2, 1.0))
    base, dpo = PolicyOnTest("base", before, {"p": Solved(2, 1)}), PolicyOnTest("dpo", after, {"p": Solved(3, 2)})
    (gain,) = changed_samples(base, dpo)
    assert (gain.kind, gain.label, gain.completion, gain.rate) == ("improved", "base", "wrong", 0.5)
    assert (gain.other_label, gain.other_completion, gain.other_rate) == ("dpo", "right", 2 / 3)
    (loss,) = changed_samples(dpo, base)
    assert (loss.kind, loss.completion, loss.other_completion) == ("worsened", "right", "wrong")


def test_a_long_text_is_cut_and_says_by_how_much() -> None:
    assert shown("short") == "short"
    assert shown("x" * (CHARACTERS + 1_234)) == "x" * CHARACTERS + "… (1,234 characters more)"
