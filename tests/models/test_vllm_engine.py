"""The vLLM engine on two tiny Phi models with random weights; transformers says what is right."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from models.chat import load_tokenizer, render_completion, render_continuation, render_prompt
from models.engine import Completion, EngineConfigurationError, EngineError, LocalModel, Request, ScoreRequest
from models.specs import VLLM, ModelRef, Sampling
from models.vllm_engine import VLLMEngine
from tests.models.tiny_fixture import TEMPLATE, save_tiny_model

pytestmark = pytest.mark.vllm

GREEDY = Sampling(temperature=0, max_completion_tokens=12)
SAMPLED = Sampling(temperature=1.0, top_k=-1, max_completion_tokens=12)
QUESTION = ({"role": "user", "content": "Ann has 12 apples, buys 7 more. How many apples has Ann now?"},)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(place / name, seed=seed) for seed, name in enumerate(["one", "two"])}


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    with VLLMEngine(VLLM(max_model_len=128, max_num_seqs=64)) as engine:
        engine.start()
        yield engine


def model(folder: Path, *, adapter: Path | None = None, template: str | None = None) -> LocalModel:
    ref = ModelRef(name=folder.name, chat_template=template)
    return LocalModel(ref=ref, weights=str(folder), adapter=adapter and str(adapter))


def requests(count: int, *, seed: int = 0) -> list[Request]:
    return [Request(key=f"{seed}:{number}", messages=QUESTION, seed=seed + number) for number in range(count)]


def texts(completions: list[Completion]) -> dict[str, str]:
    return {completion.key: completion.text for completion in completions}


def greedy_text(engine: VLLMEngine) -> str:
    (completion,) = engine.sample(requests(1), GREEDY)
    return completion.text


def expected_text(folder: Path, adapter: Path | None = None) -> str:
    """What transformers decodes greedily."""
    import torch

    tokenizer, network = load_tokenizer(str(folder), None, False), network_of(folder, adapter)
    prompt = torch.tensor([render_prompt(tokenizer, QUESTION)])
    drawn = network.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    text: str = tokenizer.decode(drawn[0, prompt.shape[1] :], skip_special_tokens=True)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")  # vLLM leaves out bytes that do not make a character yet


def network_of(folder: Path, adapter: Path | None = None) -> Any:
    from transformers import PhiForCausalLM

    network = PhiForCausalLM.from_pretrained(folder)
    if adapter is None:
        return network
    from peft import PeftModel

    return PeftModel.from_pretrained(network, adapter)


def test_swapped_weights_are_the_ones_that_are_sampled(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    assert expected_text(folders["one"]) != expected_text(folders["two"])
    for name in ("one", "two", "one"):
        engine.use(model(folders[name]))
        assert greedy_text(engine) == expected_text(folders[name])


def test_score_is_the_log_probability_transformers_computes(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    import torch

    engine.use(model(folders["one"]))
    tokenizer, continuations = load_tokenizer(str(folders["one"]), None, False), ["12 + 7 = 19", "no", ""]
    prompt = render_prompt(tokenizer, QUESTION)
    first, again = (engine.score(QUESTION, continuations) for _ in range(2))  # the second finds a warm prefix cache
    assert first == again and first[2] == []
    for continuation, score in zip(continuations, first, strict=True):
        tokens = render_continuation(tokenizer, continuation)
        logits = network_of(folders["one"])(torch.tensor([prompt + tokens])).logits[0]
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert score == pytest.approx([rows[place, token].item() for place, token in enumerate(tokens)], abs=1e-3)


def test_seed_decides_the_rollout_whatever_shares_its_batch(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    many = texts(list(engine.sample(requests(200), SAMPLED)))
    alone = texts([completion for request in requests(8) for completion in engine.sample([request], SAMPLED)])
    assert alone == {key: many[key] for key in alone}
    assert len(set(many.values())) > 190


def test_rollout_reports_its_counts_and_its_end(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    (whole,) = engine.sample(requests(1), GREEDY)
    assert (whole.finish_reason, whole.completion_tokens) == ("length", 12)
    assert whole.cumulative_logprob is not None and whole.cumulative_logprob < 0
    assert whole.prompt_tokens == len(render_prompt(load_tokenizer(str(folders["one"]), None, False), QUESTION))
    (stopped,) = engine.sample(requests(1), GREEDY.model_copy(update={"stop": (whole.text[3],)}))
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text[: whole.text.index(whole.text[3])])


def test_threads_share_the_engine(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    before, drawn = engine.generated(), dict[int, dict[str, str]]()

    def shard(number: int) -> None:
        drawn[number] = texts(list(engine.sample(requests(150, seed=1000 * number), SAMPLED)))

    threads = [threading.Thread(target=shard, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: set(found) for number, found in drawn.items()} == {
        number: {f"{1000 * number}:{place}" for place in range(150)} for number in range(3)
    }
    assert engine.generated() - before == 450


def test_prompt_that_is_too_long_fails_alone(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    long = Request(key="long", messages=({"role": "user", "content": "one more word " * 200},), seed=0)
    found: list[Completion] = []
    with pytest.raises(EngineConfigurationError, match=r"'long': its prompt takes \d+ tokens.*max_model_len is 128"):
        found.extend(engine.sample([long, *requests(3)], GREEDY))
    assert sorted(texts(found)) == ["0:0", "0:1", "0:2"]


def test_sampling_that_is_left_early_leaves_the_engine_in_order(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    iterator = engine.sample(requests(100), SAMPLED)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]  # it is a generator
    assert greedy_text(engine) == expected_text(folders["one"])


def test_chat_template_of_the_new_model_is_used(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    (plain,) = engine.sample(requests(1), GREEDY)
    engine.use(model(folders["one"], template="{{ 'Answer well. ' }}" + TEMPLATE))
    (longer,) = engine.sample(requests(1), GREEDY)
    assert longer.prompt_tokens > plain.prompt_tokens


def test_killed_child_fails_every_caller_and_the_next_call_starts_another(
    engine: VLLMEngine, folders: dict[str, Path]
) -> None:
    engine.use(model(folders["two"]))
    greedy_text(engine)
    failures: list[EngineError] = []

    def shard(number: int) -> None:
        try:
            list(engine.sample(requests(20_000, seed=number), SAMPLED))
        except EngineError as error:
            failures.append(error)

    threads = [threading.Thread(target=shard, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.5)
    assert engine._link is not None
    os.kill(engine._link._child.process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(failures) == 2 and "ended with status -9; its last lines" in str(failures[0])
    assert greedy_text(engine) == expected_text(folders["two"])


def test_model_that_cannot_be_loaded_is_a_configuration_error(engine: VLLMEngine, tmp_path: Path) -> None:
    engine.use(model(tmp_path))
    with pytest.raises(EngineConfigurationError, match="holds no tokenizer"):
        greedy_text(engine)


def test_adapter_is_loaded_into_the_live_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "dense"], init_lora_weights=False)
    get_peft_model(network_of(folders["one"]), config).save_pretrained(tmp_path)
    merged = expected_text(folders["one"], tmp_path)
    assert merged != expected_text(folders["one"])
    with VLLMEngine(VLLM(max_model_len=128, max_num_seqs=64, max_lora_rank=8)) as engine:
        for adapter, expected in [(None, expected_text(folders["one"])), (tmp_path, merged)]:
            engine.use(model(folders["one"], adapter=adapter))
            assert greedy_text(engine) == expected
        engine.use(model(folders["two"]))
        assert greedy_text(engine) == expected_text(folders["two"])


def test_adapter_without_max_lora_rank_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigurationError, match=r"set engine\.max_lora_rank"):
        VLLMEngine(VLLM()).use(model(tmp_path, adapter=tmp_path))


def test_whole_text_has_the_log_probabilities_transformers_computes(
    engine: VLLMEngine, folders: dict[str, Path]
) -> None:
    import torch

    engine.use(model(folders["one"]))
    tokenizer = load_tokenizer(str(folders["one"]), None, False)
    asked = ScoreRequest(key="k", messages=QUESTION, continuation="12 + 7 = 19", rendering="finished", in_full=True)
    (told,) = engine.score_all([asked])
    prompt, completion = render_prompt(tokenizer, QUESTION), render_completion(tokenizer, QUESTION, "12 + 7 = 19")
    assert (told.token_ids, told.prompt_tokens, told.cut_tokens) == (prompt + completion, len(prompt), 0)
    assert "".join(told.texts) == tokenizer.decode(told.token_ids)
    rows = network_of(folders["one"])(torch.tensor([told.token_ids])).logits[0].log_softmax(-1)
    expected = [rows[place, token].item() for place, token in enumerate(told.token_ids[1:])]
    assert told.logprobs[0] is None and told.logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert told.greedy[1:] == [int(rows[place].argmax()) == token for place, token in enumerate(told.token_ids[1:])]


def test_text_that_is_too_long_is_cut_as_asked_for_or_refused(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))

    def asked(cut: Literal["refuse", "left", "right"], *, in_full: bool) -> ScoreRequest:
        return ScoreRequest(key=cut, messages=QUESTION, continuation=" one more word" * 80, cut=cut, in_full=in_full)

    (right,) = engine.score_all([asked("right", in_full=True)])
    (left,) = engine.score_all([asked("left", in_full=True)])
    assert len(right.token_ids) == len(left.token_ids) == 127  # one less than the model takes, as vLLM draws a token
    assert right.cut_tokens == left.cut_tokens > 0
    assert right.prompt_tokens == len(render_prompt(load_tokenizer(str(folders["one"]), None, False), QUESTION))
    assert left.prompt_tokens == 0 and left.token_ids[-20:] != right.token_ids[:20]
    short = ScoreRequest(key="short", messages=QUESTION, continuation="no")
    found: list[str] = []
    with pytest.raises(EngineConfigurationError, match=r"'refuse': with its prompt it takes \d+ tokens"):
        found.extend(told.key for told in engine.score_all([asked("refuse", in_full=False), short]))
    assert found == ["short"]


def test_prompt_that_may_be_cut_leaves_room_for_a_completion(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    engine.use(model(folders["one"]))
    long = Request(key="long", messages=({"role": "user", "content": "one more word " * 200},), seed=0, cut_prompt=True)
    (drawn,) = engine.sample([long], GREEDY)
    assert (drawn.prompt_tokens, drawn.completion_tokens) == (128 - 12, 12) and drawn.cut_tokens > 100
    (whole,) = engine.sample([Request(key="w", messages=QUESTION, seed=0, cut_prompt=True)], GREEDY)
    assert whole.cut_tokens == 0


def test_messages_that_the_template_does_not_take_fail_alone(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    engine.use(model(folders["one"], template=refusing))
    told = "'s': the chat template does not take its messages .no system role"
    system = ({"role": "system", "content": "Be brief."}, *QUESTION)
    drawn: list[Completion] = []
    with pytest.raises(EngineConfigurationError, match=told):
        drawn.extend(engine.sample([Request(key="s", messages=system, seed=0), *requests(2)], GREEDY))
    assert len(drawn) == 2
    with pytest.raises(EngineConfigurationError, match=told):
        list(engine.score_all([ScoreRequest(key="s", messages=system, continuation="19")]))
