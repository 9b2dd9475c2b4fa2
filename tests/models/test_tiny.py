from pathlib import Path

import pytest

from models.jobs import TinyJob
from models.specs import TinyModel, TinyTraining
from models.tiny import build_tiny, save_untrained, train_tokenizer

pytestmark = pytest.mark.vllm

TEXTS = [f"Instruct: Ada has {n} apples, Ben has {n + 1}.\nOutput:\n{n} + {n + 1} = {2 * n + 1}" for n in range(60)]
STRANGE = 'Zażółć "gęślą" — 3.5 % of 12,345; x2y\t\n\n  λ 🙂 <<48/2=24>>'


@pytest.mark.parametrize("whole_numbers", [0, 200, 1000])
def test_whole_numbers_are_single_tokens_wherever_they_stand(whole_numbers: int) -> None:
    tokenizer = train_tokenizer(TinyModel(vocabulary=1_400, whole_numbers=whole_numbers), TEXTS)
    for number in range(max(10, whole_numbers)):
        (alone,) = tokenizer(str(number))["input_ids"]
        assert tokenizer(f"has {number} apples")["input_ids"].count(alone) == 1
    assert len(tokenizer("123456")["input_ids"]) > 1


def test_nothing_is_unknown_and_text_survives() -> None:
    tokenizer = train_tokenizer(TinyModel(), TEXTS)
    for text in (*TEXTS, STRANGE):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= TinyModel().vocabulary


def test_the_template_is_phi_2s_and_marks_the_completion_with_its_end() -> None:
    tokenizer = train_tokenizer(TinyModel(), TEXTS)
    turn = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "7"}]
    assert tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True) == (
        "Instruct: Hi?\nOutput:\n"
    )
    ids = tokenizer.apply_chat_template(turn, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "7<|endoftext|>"


def test_a_vocabulary_without_room_for_the_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"256 bytes, 190 whole numbers .* need 448"):
        train_tokenizer(TinyModel(vocabulary=300), TEXTS)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_untrained(TinyModel(layers=1), TEXTS, tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}


def test_a_base_is_built_from_demonstrations_and_learns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM

    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [f"{n} + 1?" for n in range(40)], "completion": ["7"] * 40}), file)
    settings = TinyModel(
        layers=1,
        hidden_size=32,
        training=TinyTraining(learning_rate=1e-2, global_batch_size=8, max_steps=40, max_length=64),
    )
    job = TinyJob(
        rows=(file,),
        settings=settings,
        output=tmp_path / "base",
        checkpoints=tmp_path / "work",
        metrics=tmp_path / "metrics.jsonl",
    )
    assert build_tiny(job).optimizer_steps == 40
    losses = [line for line in job.metrics.read_text().splitlines() if '"loss"' in line]
    assert float(losses[-1].split()[-1].rstrip("}")) < 0.5 < float(losses[0].split()[-1].rstrip("}"))
    assert AutoModelForCausalLM.from_pretrained(job.output).config.architectures == ["PhiForCausalLM"]
