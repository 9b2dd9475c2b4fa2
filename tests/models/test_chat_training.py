"""Training on whole chats: what is learnt of them, packed rows kept apart, new chat tokens, and the merged model."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.chat import load_tokenizer, render_conversation
from models.jobs import PreferenceJob, SFTJob
from models.packing import keeps_walls, one_at_a_time
from models.specs import SFT, ChatTokens, LoRA, Preference, PromptTemplate
from models.trainers import fit_preferences, fit_sft, sft_rows, split_batch
from models.training_rows import read_chats, read_sides
from tests.models.tiny_fixture import save_tiny_model

pytestmark = pytest.mark.vllm  # TRL and transformers themselves
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ChatTokens(template=CHATML, tokens=("<|im_start|>", "<|im_end|>"), end="<|im_end|>")
CHATS = [
    (["user", "assistant", "user", "assistant"], [f"{n} apples?", f"{n}", "And coins?", "7 coins"]) for n in range(8)
]
CHATS += [(["system", "user", "assistant"], ["Be short.", f"{n} books and {n} more?", f"{2 * n}"]) for n in range(8)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("start"), seed=1)


def parquet(file: Path, **columns: list[Any]) -> tuple[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file)
    return (file,)


def sft_job(start: Path, folder: Path, name: str = "a", **settings: Any) -> SFTJob:
    rows = parquet(folder / "chats.parquet", roles=[r for r, _ in CHATS], contents=[c for _, c in CHATS])
    chosen: dict[str, Any] = {"learning_rate": 1e-3, "global_batch_size": 16, "max_length": 96, **settings}
    return SFTJob(
        weights=str(start),
        rows=rows,
        settings=SFT(**chosen),
        output=folder / name,
        checkpoints=folder / f"{name}-checkpoints",
        metrics=folder / f"{name}.jsonl",
    )


def first_loss(job: SFTJob | PreferenceJob) -> float:
    import json

    rows = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    return next(float(row["value"]) for row in rows if row["name"] == "loss")


def test_every_reply_is_learnt_and_nothing_else(start: Path) -> None:
    tokenizer = load_tokenizer(str(start), None, False)
    roles, contents = CHATS[3]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    ids, trained, rewritten = render_conversation(tokenizer, messages)
    learnt = tokenizer.decode([token for token, train in zip(ids, trained, strict=True) if train])
    assert learnt == "3<|endoftext|>7 coins<|endoftext|>"
    assert tokenizer.decode(ids).startswith("Instruct: 3 apples?\nOutput:\n3<|endoftext|>Instruct: And coins?")
    assert rewritten == 0


def test_a_reply_that_the_template_takes_away_later_is_not_learnt_and_counted(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Instruct: {{ m['content'] }}\nOutput:\n"
        "{% elif loop.last %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    folder = save_tiny_model(tmp_path / "forgetful", seed=1, chat_template=forgetful)
    job = sft_job(folder, tmp_path)
    rows, dropped = sft_rows(job, load_tokenizer(str(folder), None, False))
    assert len(rows) == 16
    assert dropped == {"earlier replies that the template renders otherwise later on, not trained on": 8}


def test_the_templates_system_text_stands_before_chats_that_have_none(start: Path, tmp_path: Path) -> None:
    job = sft_job(start, tmp_path)
    chats = list(read_chats(job.rows, PromptTemplate(system="Be kind.")))
    assert [message["content"] for message in chats[0][:2]] == ["Be kind.", "0 apples?"]
    assert [message["content"] for message in chats[8][:2]] == ["Be short.", "0 books and 0 more?"]


def test_packed_rows_cost_what_they_cost_apart(start: Path, tmp_path: Path) -> None:
    apart = sft_job(start, tmp_path, "apart", max_steps=1)
    packed = sft_job(start, tmp_path, "packed", max_steps=1, packing=True)
    assert fit_sft(packed).rows == fit_sft(apart).rows == 16
    assert first_loss(packed) == pytest.approx(first_loss(apart), rel=1e-5)


@pytest.mark.parametrize(
    ("attention", "settings", "per_device", "accumulation"),
    [
        pytest.param("sdpa", {}, 1, 4, id="one by one where attention works out squares"),
        pytest.param("sdpa", {"per_device_batch_size": 2}, 2, 2, id="as many as are asked for"),
        pytest.param("sdpa", {"embedding_noise": 5.0}, 4, 1, id="all at once where that would change the noise"),
        pytest.param("flash_attention_2", {}, 4, 1, id="all at once where attention skips other rows"),
    ],
)
def test_packed_sequences_are_taken_one_by_one_where_that_is_faster_and_the_same(
    start: Path, attention: str, settings: dict[str, Any], per_device: int, accumulation: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start)
    model.config._attn_implementation_internal = attention  # flash attention itself wants a GPU
    chosen = one_at_a_time(SFT(packing=True, global_batch_size=4, **settings), model)
    batching = split_batch(chosen, rows=40, devices=1)
    assert (batching.per_device, batching.accumulation) == (per_device, accumulation)


def test_packed_sequences_one_by_one_cost_what_they_cost_at_once(start: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"max_steps": 1, "packing": True, "max_length": 48, "global_batch_size": 4}
    one_by_one = sft_job(start, tmp_path, "one-by-one", **chosen)
    at_once = sft_job(start, tmp_path, "at-once", **chosen, per_device_batch_size=4)
    assert fit_sft(one_by_one).tokens == fit_sft(at_once).tokens
    assert first_loss(one_by_one) == pytest.approx(first_loss(at_once), rel=1e-5)


def test_packing_is_refused_where_a_row_sees_the_one_before_it(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, masking_utils

    model = AutoModelForCausalLM.from_pretrained(start)
    assert keeps_walls(model)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    assert not keeps_walls(model)
    with pytest.raises(ValueError, match=r"PhiForCausalLM \(sdpa\) lets packed rows see each other.*packing: false"):
        fit_sft(sft_job(start, tmp_path, packing=True))


def test_embedding_noise_is_on_in_training_and_not_in_the_model(start: Path, tmp_path: Path) -> None:
    clean, noisy = (sft_job(start, tmp_path, name, max_steps=1) for name in ("clean", "noisy"))
    noisy = noisy.model_copy(update={"settings": noisy.settings.model_copy(update={"embedding_noise": 50.0})})
    fit_sft(clean)
    fit_sft(noisy)
    assert first_loss(noisy) != pytest.approx(first_loss(clean), rel=1e-3)


def test_new_chat_tokens_are_learnt_and_the_merged_folder_is_what_was_trained(start: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = LoRA(rank=4, alpha=8, dropout=0.0)
    job = sft_job(start, tmp_path, chat_tokens=TOKENS, lora=lora, epochs=4, learning_rate=1e-2)
    assert fit_sft(job).optimizer_steps == 4
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(job.output), load_tokenizer(str(job.output), None, False)
    new = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS.tokens]
    assert tokenizer.eos_token == "<|im_end|>"
    assert merged.config.eos_token_id == new[1]
    base = AutoModelForCausalLM.from_pretrained(start)
    before, after = (model.get_input_embeddings().weight for model in (base, merged))
    assert all(not torch.equal(before[token], after[token]) for token in new)
    assert torch.equal(before[:300], after[:300])  # the old ones stay
    assert not torch.equal(base.lm_head.weight, merged.lm_head.weight)
    ids = torch.tensor([tokenizer("<|im_start|>user\n3 apples?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]])
    adapted = PeftModel.from_pretrained(base, job.checkpoints / "adapter")
    assert set(ids[0].tolist()) >= set(new)
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)


def test_new_tokens_that_do_not_fit_into_the_embeddings_get_new_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "small", seed=1)
    tokenizer = load_tokenizer(str(folder), None, False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    job = sft_job(folder, tmp_path, chat_tokens=TOKENS, lora=LoRA(rank=4, alpha=8, dropout=0.0), max_steps=1)
    fit_sft(job)
    merged = AutoModelForCausalLM.from_pretrained(job.output)
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer) + 2


def test_an_adapter_cannot_hold_new_tokens() -> None:
    with pytest.raises(ValidationError, match=r"set lora\.merge: true"):
        SFT(chat_tokens=TOKENS, lora=LoRA(merge=False))
    with pytest.raises(ValidationError, match="none of the tokens"):
        ChatTokens(template="x", tokens=("<a>",), end="<b>")


@pytest.mark.parametrize(("loss", "at_the_start"), [("apo_zero", 1.0), ("apo_down", 1.0), ("sigmoid", math.log(2))])
def test_pairs_of_chats_are_learnt_from_where_the_reference_stands(
    start: Path, tmp_path: Path, loss: Any, at_the_start: float
) -> None:
    # Policy and reference are one at first: apo_zero is 1 - 1/2 + 1/2, apo_down 1/2 + 1 - 1/2, DPO's -log 1/2.
    rows = parquet(
        tmp_path / "pairs.parquet",
        roles=[["system", "user"]] * 8,
        contents=[["Be short.", f"{n} apples?"] for n in range(8)],
        chosen=[f"{n}" for n in range(8)],
        rejected=["I do not know"] * 8,
    )
    (first, *_) = read_sides(rows, PromptTemplate(system="unused"))
    assert [message["content"] for message in first.messages] == ["Be short.", "0 apples?"]
    settings = Preference(
        loss_type=(loss,), learning_rate=1e-3, global_batch_size=8, max_length=96, max_steps=3,
        lora=LoRA(rank=4, alpha=8, dropout=0.05),
    )  # fmt: skip
    job = PreferenceJob(
        weights=str(start), rows=rows, settings=settings, output=tmp_path / "p", checkpoints=tmp_path / "c",
        metrics=tmp_path / "m.jsonl",
    )  # fmt: skip
    fit_preferences(job)
    assert first_loss(job) == pytest.approx(at_the_start, abs=1e-4)
    assert (tmp_path / "p" / "model.safetensors").is_file()


def test_vllm_serves_the_merged_folder_and_stops_at_the_new_end_of_turn(start: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from models.chat import render_prompt
    from models.engine import LocalModel, Request
    from models.specs import VLLM, ModelRef, Sampling
    from models.vllm_engine import VLLMEngine

    lora = LoRA(rank=8, alpha=16, dropout=0.0, target_modules=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"))
    job = sft_job(start, tmp_path, chat_tokens=TOKENS, lora=lora, epochs=60, learning_rate=1e-2, packing=True)
    fit_sft(job)
    question = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "3 books and 3 more?"})
    local = LocalModel(ref=ModelRef(name="merged"), weights=str(job.output), adapter=None)
    with VLLMEngine(VLLM(max_model_len=96, max_num_seqs=8, dtype="float32")) as engine:
        engine.use(local)
        greedy = Sampling(temperature=0, max_completion_tokens=12)
        (drawn,) = engine.sample([Request(key="k", messages=question, seed=0)], greedy)
    tokenizer, merged = load_tokenizer(str(job.output), None, False), AutoModelForCausalLM.from_pretrained(job.output)
    prompt = torch.tensor([render_prompt(tokenizer, question)])
    written = merged.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert drawn.text == tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    assert drawn.finish_reason == "stop"  # at <|im_end|>, whose embedding and head were random before
