"""The fake engine: deterministic, with the skill its name says."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from models.engine import Completion, EngineConfigurationError, EngineError, Request, ScoreRequest, open_engine
from models.fake_engine import fake_skill, train_fake
from models.specs import Fake, ModelRef, Sampling


def rollouts(
    name: str, count: int = 400, *, temperature: float = 0.8, settings: Fake | None = None
) -> list[Completion]:
    requests = [
        Request(key=str(number), messages=({"role": "user", "content": "What is 12 + 7?"},), seed=number)
        for number in range(count)
    ]
    with open_engine(settings or Fake(), ModelRef(name=name)) as engine:
        drawn = list(engine.sample(requests, Sampling(temperature=temperature)))
        assert engine.generated() == count
    return drawn


def kind(completion: Completion) -> str:
    answers = [line.split()[-1] for line in completion.text.splitlines() if line.startswith("FINAL ANSWER")]
    if completion.finish_reason == "length":
        return "truncated"
    return "no marker" if not answers else "two answers" if len(answers) == 2 else str(answers[0] == "19")


def test_share_of_right_completions_is_the_skill() -> None:
    kinds = Counter(map(kind, rollouts("fake:0.4")))
    # 400 draws at 0.4: 160 right, standard deviation 9.8; the slips share the other 240 as 120, 84, 19 and 17.
    assert abs(kinds["True"] - 160) < 40
    assert abs(kinds["False"] - 120) < 40
    assert abs(kinds["no marker"] - 84) < 36
    assert 0 < kinds["two answers"] < 45 and 0 < kinds["truncated"] < 45


def test_right_completion_shows_its_step_and_the_marker() -> None:
    (completion,) = rollouts("fake:1", 1)
    assert completion.text == "12 + 7 = 19\nFINAL ANSWER: 19"
    assert (completion.finish_reason, completion.prompt_tokens, completion.completion_tokens) == ("stop", 5, 8)


def test_right_completions_are_likelier_than_wrong_ones() -> None:
    by_kind: dict[bool, list[float]] = {True: [], False: []}
    for completion in rollouts("fake:0.5"):
        assert completion.cumulative_logprob is not None
        by_kind[kind(completion) == "True"].append(completion.cumulative_logprob / completion.completion_tokens)
    assert min(by_kind[True]) > max(by_kind[False])


def test_seed_decides_when_sampling_and_does_not_when_greedy() -> None:
    assert len({completion.text for completion in rollouts("fake:0.4", 20)}) > 1
    assert len({completion.text for completion in rollouts("fake:0.4", 20, temperature=0)}) == 1


def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.models.test_fake_engine import rollouts\nimport json, sys\n"
        "json.dump([completion.text for completion in rollouts('fake:0.4', 30)], sys.stdout)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(again) == [completion.text for completion in rollouts("fake:0.4", 30)]


def test_prompt_named_in_fail_prompts_brings_the_engine_down() -> None:
    with pytest.raises(EngineError, match=r"told to die at prompts that contain '12 \+ 7'"):
        rollouts("fake:0.4", settings=Fake(fail_prompts=("12 + 7",)))


def test_scores_are_deterministic_and_one_a_word() -> None:
    messages = [{"role": "user", "content": "Is it right?"}]
    with open_engine(Fake(), ModelRef(name="fake:0.4")) as engine:
        scores = engine.score(messages, ["Yes", "not at all", ""])
        assert scores == engine.score(messages, ["Yes", "not at all", ""])
    assert [len(score) for score in scores] == [1, 3, 0]
    assert all(-3 <= value <= 0 for score in scores for value in score)


@pytest.mark.parametrize(
    ("share", "rows", "skill"),
    [
        pytest.param(1.0, 40, 0.7, id="half of the way from 0.4 to 1"),
        pytest.param(1.0, 100_000, 0.95, id="never above 0.95"),
        pytest.param(0.4, 40, 0.4, id="unfiltered rows teach nothing"),
        pytest.param(0.0, 40, 0.2, id="wrong rows do harm"),
        pytest.param(1.0, 0, 0.4, id="no rows"),
    ],
)
def test_training_leaves_a_checkpoint_with_another_skill(tmp_path: Path, share: float, rows: int, skill: float) -> None:
    train_fake("fake:0.4", share, rows, tmp_path / "trained")
    assert fake_skill(str(tmp_path / "trained")) == pytest.approx(skill, abs=1e-3)


@pytest.mark.parametrize("name", ["microsoft/phi-2", "fake:much", "fake:1.5"])
def test_name_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(EngineConfigurationError, match="fake model"):
        open_engine(Fake(), ModelRef(name=name))


def test_label_of_a_checkpoint_cannot_be_opened_by_name() -> None:
    with pytest.raises(EngineConfigurationError, match="only its label"):
        open_engine(Fake(), ModelRef(name="iteration 1", digest="abc"))


def test_a_text_scored_in_full_has_its_prompts_words_too() -> None:
    messages = ({"role": "user", "content": "Is it right?"},)
    with open_engine(Fake(), ModelRef(name="fake:0.4")) as engine:
        whole, part = engine.score_all(
            ScoreRequest(key=str(full), messages=messages, continuation="not at all", in_full=full)
            for full in (True, False)
        )
        assert part.logprobs == whole.logprobs[3:] == engine.score(messages, ["not at all"])[0]
    assert (whole.texts, whole.prompt_tokens, whole.logprobs[0]) == (
        ["Is ", "it ", "right?", "not ", "at ", "all"],
        3,
        None,
    )
    assert (part.texts, part.prompt_tokens, len(part.token_ids)) == ([], 0, 3)
