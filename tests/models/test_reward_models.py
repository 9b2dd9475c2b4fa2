"""Reward models: scored in a child process, each text by itself."""

import math
from pathlib import Path

import pytest

from models.reward_models import RewardJob, RewardModelError, score_in_child, score_texts
from models.specs import Fake, ModelRef, PromptTemplate
from storage.datasets import read_rows, write_rows
from storage.rows import Comparison, Pair
from tasks.asks import RewardAsk
from tasks.comparing import compare_pairs
from tasks.loading import open_folder
from tasks.pairs import pair_with_gold
from tests.models.tiny_fixture import save_tokenizer
from tests.tasks.builders import demonstration, rollout

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi with one output and random weights."""
    import torch
    from transformers import PhiConfig, PhiForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    save_tokenizer(folder)
    config = PhiConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        PhiForSequenceClassification(config).save_pretrained(folder)
    return folder


TEXTS = (("Is 2 + 2 four?", "Yes."), ("Is 2 + 2 five?", "No, it is four."), ("Is 2 + 2 four?", "No." * 200))


def job(model: Path, batch_size: int) -> RewardJob:
    return RewardJob(weights=str(model), texts=TEXTS, max_length=64, batch_size=batch_size, precision="float32")


def test_scores_are_those_of_the_model_whatever_the_batch_and_too_long_is_unknown(reward_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    expected = []
    for prompt, completion in TEXTS[:2]:
        ids = tokenizer(f"Instruct: {prompt}\nOutput:\n{completion}<|endoftext|>", add_special_tokens=False)[
            "input_ids"
        ]
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids])).logits[0, 0]))
    for batch_size in (1, 4):
        first, second, too_long = score_texts(job(reward_model, batch_size))
        assert (first, second) == (pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], abs=1e-5))
        assert too_long is None
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_a_model_with_two_outputs_is_no_reward_model(reward_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    two = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has 2 outputs, a reward model has one"):
        score_texts(job(tmp_path, 1))


def test_pairs_are_compared_by_a_real_reward_model(reward_model: Path) -> None:
    made = pair_with_gold(demonstration(), [rollout(0, "mine"), rollout(1, "mine too")], 1).pairs
    judge = open_folder(ModelRef(name=str(reward_model)))
    asks = RewardAsk(max_length=64)
    ref = compare_pairs(judge, write_rows(made, Pair, step="pairs"), asks, PromptTemplate(), Fake(), "x")
    texts = tuple((made[0].prompt, text) for text in ("human", "mine", "mine too"))
    human, *mine = score_texts(job(reward_model, 1).model_copy(update={"texts": texts}))
    assert human is not None
    told = [row.chosen_reward for row in read_rows(ref, Comparison)]
    assert told == [pytest.approx(1 / (1 + math.exp((one or 0.0) - human)), abs=1e-5) for one in mine]


def test_the_child_brings_the_same_scores_and_tells_why_it_failed(reward_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    told = score_in_child(job(reward_model, 2), lines.append)
    assert told == [None if one is None else pytest.approx(one) for one in score_texts(job(reward_model, 2))]
    with pytest.raises(RewardModelError, match="exit status 1"):
        score_in_child(job(tmp_path, 2), lines.append)
