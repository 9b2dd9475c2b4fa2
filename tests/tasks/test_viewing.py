"""The policy view's numbers, on the fake engine: words are its tokens."""

from dataclasses import replace

import pytest

from models.specs import Fake, ModelRef, PromptTemplate
from storage.datasets import DatasetError, DatasetRef, read_rows, write_rows
from storage.rows import Demonstration, Pair, Prompt, ScoredRollout, TokenComparison, TokenScore
from tasks.viewing import Choice, chosen_texts, compare_tokens, score_tokens, view_logprobs
from tests.tasks.builders import demonstration, scored

STRONG, WEAK = ModelRef(name="fake:0.9"), ModelRef(name="fake:0.1")


def rollouts() -> DatasetRef:
    rows = [
        scored(0, 1.0, prompt_id="aa", completion="12 + 7 = 19"),
        scored(1, 0.0, prompt_id="aa", completion="12 + 7 = 18"),
        scored(0, None, prompt_id="bb", completion="12 +", finish_reason="length"),
    ]
    return write_rows(rows, ScoredRollout, step="scored")


def view(rows: DatasetRef, choice: Choice = Choice()) -> list[TokenComparison]:  # noqa: B008  # frozen
    compared = view_logprobs(STRONG, WEAK, rows, choice, PromptTemplate(), Fake())
    return list(read_rows(compared, TokenComparison))


def test_every_token_stands_there_under_both_policies() -> None:
    tokens = [token for token in view(rollouts()) if token.sequence == 0]
    assert "".join(token.token for token in tokens) == "prompt aa" + "12 + 7 = 19"
    assert [token.is_prompt for token in tokens] == [True, True, False, False, False, False, False]
    assert [token.position for token in tokens] == list(range(7))
    assert (tokens[0].policy_logprob, tokens[0].difference) == (None, None)  # nothing comes before it
    for token in tokens[1:]:
        assert token.policy_logprob is not None and token.reference_logprob is not None
        assert token.difference == token.policy_logprob - token.reference_logprob
    assert (tokens[0].policy, tokens[0].reference) == ("fake:0.9@unpinned", "fake:0.1@unpinned")


def test_what_is_known_of_a_text_is_told() -> None:
    texts = chosen_texts(rollouts(), Choice())
    assert [text.about for text in texts] == [
        "reward 1, match",
        "reward 0, mismatch",
        "no reward, no final answer, cut at its longest",
    ]
    assert [text.finished for text in texts] == [True, True, False]


def test_rows_are_chosen_by_the_beginning_of_their_prompts_and_by_their_index() -> None:
    rows = rollouts()

    def chosen(*wanted: str) -> list[tuple[str, int | None]]:
        return [(text.prompt_id, text.rollout_index) for text in chosen_texts(rows, Choice(rows=wanted))]

    assert chosen("b", "aa/1") == [("bb", 0), ("aa", 1)]
    assert chosen("a") == [("aa", 0), ("aa", 1)]
    with pytest.raises(ValueError, match=r"cc: no row of datasets/scored/.* has a prompt_id that begins so"):
        chosen("a", "cc")


def test_the_first_rows_are_chosen_where_none_is_named() -> None:
    assert len(chosen_texts(rollouts(), Choice(first=2))) == 2


def test_both_sides_of_a_pair_are_texts() -> None:
    pair = Pair(
        prompt_id="aa",
        iteration=0,
        prompt="?",
        chosen="yes",
        rejected="no",
        chosen_index=4,
        rejected_index=None,
        chosen_reward=1.0,
        rejected_reward=None,
        margin=None,
        rule="zip",
        swapped=False,
    )
    texts = chosen_texts(write_rows([pair], Pair, step="pairs"), Choice())
    assert [(text.side, text.completion, text.rollout_index, text.about) for text in texts] == [
        ("chosen", "yes", 4, "reward 1"),
        ("rejected", "no", None, "no reward"),
    ]


def test_demonstrations_can_be_looked_at_and_prompts_cannot() -> None:
    rows = write_rows([demonstration(completion="so it is")], Demonstration, step="demonstrations")
    assert [text.completion for text in chosen_texts(rows, Choice())] == ["so it is"]
    prompts = write_rows([Prompt(prompt_id="p", source="s", prompt="?", answer=None)], Prompt, step="prompts")
    with pytest.raises(ValueError, match="holds Prompt rows; what can be looked at: Rollout, ScoredRollout"):
        chosen_texts(prompts, Choice())


def test_a_policy_is_scored_once_for_all_it_is_compared_with() -> None:
    rows, choice = rollouts(), Choice()
    view(rows)
    assert score_tokens.lookup(WEAK, rows, choice, PromptTemplate(), Fake()).found is not None
    assert score_tokens.lookup(ModelRef(name="fake:0.5"), rows, choice, PromptTemplate(), Fake()).found is None


def test_policies_that_take_the_text_for_other_tokens_are_not_compared() -> None:
    mine = score_tokens(STRONG, rollouts(), Choice(), PromptTemplate(), Fake())
    tokens = list(read_rows(mine, TokenScore))
    other = write_rows([*tokens[:-1], replace(tokens[-1], token_id=-5, token="x")], TokenScore, step="token_scores")
    with pytest.raises(DatasetError, match=r"token \d+ of text 2 is .* and 'x'.*one tokenizer and one chat template"):
        compare_tokens(mine, other)
    with pytest.raises(DatasetError, match=r"the same text for the same tokens: .* tokens"):
        compare_tokens(mine, write_rows(tokens[:-1], TokenScore, step="token_scores"))
