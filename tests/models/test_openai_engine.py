"""The OpenAI engine against a small server on loopback that fails on purpose."""

import json
import time
from math import exp, log
from typing import Any

import pytest

from models import openai_engine
from models.engine import (
    PLAIN,
    Completion,
    EngineConfigurationError,
    EngineError,
    LocalModel,
    Request,
    ScoreRequest,
    UnknownProbability,
    open_engine,
)
from models.openai_engine import OpenAIEngine
from models.specs import ModelRef, OpenAI, Sampling
from tests.models.endpoints import Reply, Server, likeliest, ok, serving

pytestmark = pytest.mark.flow  # a library, a server or a run that takes too long for every save

SAMPLING = Sampling(temperature=0.5, top_k=-1, max_completion_tokens=20, stop=("###",))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def failing(status: int, message: str = "busy", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, message.encode()


def sample(*urls: str, count: int = 1, sampling: Sampling = SAMPLING, **settings: Any) -> list[Completion]:
    requests = [
        Request(key=str(number), messages=({"role": "user", "content": f"Question {number}"},), seed=number)
        for number in range(count)
    ]
    with open_engine(OpenAI(endpoints=urls, **settings), ModelRef(name="judge")) as engine:
        return list(engine.sample(requests, sampling))


def test_request_says_what_was_asked_and_reply_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    logprobs = {"content": [{"token": "FI", "logprob": -0.5}, {"token": "NE", "logprob": -0.25}]}
    with serving(lambda number, body: ok(logprobs=logprobs)) as server:
        (completion,) = sample(server.url, api_key_variable="JUDGE_KEY")
    assert completion == Completion(
        key="0", text="FINE", prompt_tokens=5, completion_tokens=2, finish_reason="stop", cumulative_logprob=-0.75
    )
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.bodies[0] == {
        "path": "/v1/chat/completions",
        "model": "judge",
        "messages": [{"role": "user", "content": "Question 0"}],
        "seed": 0,
        "n": 1,
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 20,
        "stop": ["###"],
        "logprobs": True,
    }


def test_top_k_is_sent_only_when_it_is_set() -> None:
    with serving(lambda number, body: ok()) as server:
        (completion,) = sample(server.url, sampling=Sampling(top_k=40), logprobs=False)
    assert completion.cumulative_logprob is None
    assert server.bodies[0]["top_k"] == 40 and not {"stop", "logprobs"} & set(server.bodies[0])


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(failing(429), id="too many requests"),
        pytest.param(failing(500), id="server error"),
        pytest.param((200, {"Content-Length": "999"}, b'{"choices": [{"mess'), id="connection cut"),
        pytest.param((200, {}, b'{"choices": [{"mess'), id="body cut"),
        pytest.param((200, {}, b'{"choices": []}'), id="no choice"),
        pytest.param(ok(finish_reason=None), id="not finished"),
    ],
)
def test_failure_that_may_pass_is_tried_again(first: Reply) -> None:
    with serving(lambda number, body: first if number == 0 else ok()) as server:
        assert [completion.text for completion in sample(server.url)] == ["FINE"]
        assert len(server.bodies) == 2


def test_retry_after_is_honoured() -> None:
    with serving(lambda number, body: failing(429, Retry_After="0.3") if number == 0 else ok()) as server:
        began = time.monotonic()
        sample(server.url)
    assert 0.3 <= time.monotonic() - began < 1.0


def test_request_that_hangs_is_given_up_and_tried_again() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        if number == 0:
            time.sleep(0.4)
        return ok()

    with serving(answer) as server:
        assert len(sample(server.url, timeout_seconds=0.1)) == 1


def test_endpoint_that_always_fails_is_an_engine_error_with_its_last_words() -> None:
    with serving(lambda number, body: failing(500, "out of memory")) as server:
        with pytest.raises(EngineError, match=r"no endpoint is left.*HTTP 500: out of memory"):
            sample(server.url, max_retries=2)
        assert len(server.bodies) == 3
    with (
        serving(lambda number, body: failing(429, "slow down")) as server,
        pytest.raises(EngineError, match=r"failed 3 times for one request, at last with: HTTP 429: slow down"),
    ):
        sample(server.url, max_retries=2)


def test_request_that_always_fails_does_not_take_the_endpoint_with_it() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        return failing(500, "poison") if body["seed"] == 3 else ok()

    requests = [Request(key=str(n), messages=({"role": "user", "content": "x"},), seed=n) for n in range(8)]
    found: list[Completion] = []
    with serving(answer) as server:
        settings = OpenAI(endpoints=(server.url,), concurrency=1, max_retries=2)
        with (
            open_engine(settings, ModelRef(name="m")) as engine,
            pytest.raises(EngineError, match="failed 3 times for one request, at last with: HTTP 500: poison"),
        ):
            found.extend(engine.sample(requests, SAMPLING))
    assert len(found) >= 3


def test_burst_of_failures_does_not_drop_the_only_endpoint() -> None:
    with serving(lambda number, body: failing(503) if number < 20 else ok()) as server:
        assert len(sample(server.url, count=20)) == 20


def test_engine_tries_again_after_an_engine_error() -> None:
    with serving(lambda number, body: failing(500) if number < 3 else ok()) as server:
        ref, request = ModelRef(name="judge"), Request(key="0", messages=({"role": "user", "content": "x"},), seed=0)
        with open_engine(OpenAI(endpoints=(server.url,), max_retries=2), ref) as engine:
            with pytest.raises(EngineError):
                list(engine.sample([request], SAMPLING))
            assert len(list(engine.sample([request], SAMPLING))) == 1
            assert engine.generated() == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusal_is_a_configuration_error_with_the_servers_message(status: int) -> None:
    with serving(lambda number, body: failing(status, "Unrecognized argument: top_k")) as server:
        with pytest.raises(EngineConfigurationError, match=f"'judge' with HTTP {status}: Unrecognized argument: top_k"):
            sample(server.url)
        assert len(server.bodies) == 1


def test_requests_of_a_dead_endpoint_move_on() -> None:
    with serving(lambda number, body: ok()) as server:
        completions = sample("http://127.0.0.1:9", server.url, count=30, concurrency=4)
        assert {completion.key for completion in completions} == {str(number) for number in range(30)}
        assert len(server.bodies) == 30


def test_load_is_shared_and_concurrency_is_kept() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.01)
        return ok(body["messages"][0]["content"])

    with serving(answer) as one, serving(answer) as two:
        completions = sample(one.url, two.url, count=40, concurrency=5)
    assert {completion.key: completion.text for completion in completions} == {
        str(number): f"Question {number}" for number in range(40)
    }
    assert abs(len(one.bodies) - len(two.bodies)) <= 10
    assert 2 <= one.busiest <= 5 and 2 <= two.busiest <= 5


def test_one_refused_request_does_not_lose_the_others() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        return failing(400, "too long") if body["seed"] == 3 else ok()

    requests = [Request(key=str(n), messages=({"role": "user", "content": "x"},), seed=n) for n in range(8)]
    found: list[Completion] = []
    with (
        serving(answer) as server,
        open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine,
        pytest.raises(EngineConfigurationError, match="too long"),
    ):
        found.extend(engine.sample(requests, SAMPLING))
    assert {completion.key for completion in found} == set("0124567")


def test_missing_usage_is_counted_from_logprobs_or_refused() -> None:
    def answer(logprobs: Any) -> Reply:
        choice = {"message": {"content": "x"}, "finish_reason": "length", "logprobs": logprobs}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    with serving(lambda number, body: answer({"content": [{"logprob": -1.0}] * 3})) as server:
        assert sample(server.url)[0].completion_tokens == 3
    with (
        serving(lambda number, body: answer(None)) as server,
        pytest.raises(EngineConfigurationError, match="neither usage nor logprobs"),
    ):
        sample(server.url)


def test_score_reads_the_prompt_logprobs_behind_the_prompt() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        tokens = 3 if body["messages"][-1]["role"] == "user" else 5
        places = [None, *({str(place): {"logprob": -place / 10}} for place in range(1, tokens))]
        content = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "prompt_logprobs": places}
        return 200, {}, json.dumps(content).encode()

    messages = [{"role": "user", "content": "Is it right?"}]
    with serving(answer) as server, open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine:
        assert engine.score(messages, ["Yes", ""]) == [[-0.3, -0.4], []]


def test_whole_text_is_told_from_the_prompt_logprobs() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        words = ["<s>", "Is", "it"] if body["messages"][-1]["role"] == "user" else ["<s>", "Is", "it", "Yes", "</s>"]
        places = [{str(n): {"logprob": -n / 10, "rank": n - 2, "decoded_token": word}} for n, word in enumerate(words)]
        content = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
        return 200, {}, json.dumps({**content, "prompt_logprobs": [None, *places[1:]]}).encode()

    asked = ScoreRequest(
        key="k",
        messages=({"role": "user", "content": "Is it?"},),
        continuation="Yes",
        rendering="finished",
        in_full=True,
    )
    with serving(answer) as server, open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine:
        (told,) = engine.score_all([asked])
    assert (told.texts, told.prompt_tokens) == (["", "Is", "it", "Yes", "</s>"], 3)
    assert told.logprobs == [None, -0.1, -0.2, -0.3, -0.4]
    assert told.greedy == [False, False, False, True, False]


def test_plain_text_is_refused_since_the_server_would_put_its_template_around_it() -> None:
    plain = ScoreRequest(key="k", messages=({"role": PLAIN, "content": "Is it?"},), continuation="Yes")
    with (
        serving(lambda number, body: ok()) as server,
        open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine,
        pytest.raises(EngineConfigurationError, match="puts its own chat template around every text"),
    ):
        list(engine.score_all([plain]))


def test_a_prompt_that_the_server_renders_otherwise_before_a_given_reply_is_refused() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        opened = body["messages"][-1]["role"] == "user"
        tokens = ["0", "1", "2"] if opened else ["0", "1", "23", "4"]  # the prompt's last was merged with the label
        places = [None, *({token: {"logprob": -1.0}} for token in tokens[1:])]
        content = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "prompt_logprobs": places}
        return 200, {}, json.dumps(content).encode()

    with (
        serving(answer) as server,
        open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine,
        pytest.raises(EngineConfigurationError, match=r"token 2 of the prompt is .* not of one text"),
    ):
        engine.score([{"role": "user", "content": "Is it right?"}], ["Yes"])


def test_score_by_the_likeliest_tokens_adds_up_spellings_and_asks_once() -> None:
    tokens = (("Yes", log(0.5)), (" Yes", log(0.25)), ("No", log(0.125)), ("Maybe", log(0.0625)))
    with (
        serving(lambda number, body: likeliest(*tokens)) as server,
        open_engine(OpenAI(endpoints=(server.url,), scoring="top_logprobs"), ModelRef(name="m")) as engine,
    ):
        (positive,), (negative,), nothing = engine.score([{"role": "user", "content": "?"}], ["Yes", "No", ""])
    assert exp(positive) == pytest.approx(0.75)  # 0.5 + 0.25: a space before it makes no other answer
    assert exp(negative) == pytest.approx(0.125)
    assert nothing == []
    (asked,) = server.bodies
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"], asked["temperature"]) == (True, 20, 1, 1.0)


def test_a_label_that_is_not_among_the_likeliest_tokens_is_unknown_and_not_impossible() -> None:
    with (
        serving(lambda number, body: likeliest(("Yes", -0.01), ("Sure", -5.0))) as server,
        open_engine(OpenAI(endpoints=(server.url,), scoring="top_logprobs"), ModelRef(name="m")) as engine,
        pytest.raises(UnknownProbability, match="'No' is not among the 20 likeliest first tokens") as caught,
    ):
        engine.score([{"role": "user", "content": "?"}], ["Yes", "No"])
    assert caught.value.found == ("Yes", "Sure")


@pytest.mark.parametrize(
    "reply",
    [ok(), ok(logprobs=None), ok(logprobs={"content": []}), ok(logprobs={"content": [{"token": "x"}]})],
    ids=["no field", "null", "no token", "no likeliest tokens"],
)
def test_an_endpoint_without_logprobs_is_named_as_such(reply: Reply) -> None:
    with (
        serving(lambda number, body: reply) as server,
        open_engine(OpenAI(endpoints=(server.url,), scoring="top_logprobs"), ModelRef(name="m")) as engine,
        pytest.raises(EngineConfigurationError, match=r"expected to hold logprobs.content\[0\].top_logprobs"),
    ):
        engine.score([{"role": "user", "content": "?"}], ["Yes"])


def test_endpoint_that_cannot_score_is_named_as_such() -> None:
    messages = [{"role": "user", "content": "Is it right?"}]
    with (
        serving(lambda number, body: ok()) as server,
        open_engine(OpenAI(endpoints=(server.url,)), ModelRef(name="m")) as engine,
        pytest.raises(EngineConfigurationError, match="the endpoint cannot score"),
    ):
        engine.score(messages, ["Yes"])


def test_chat_template_of_ones_own_is_refused() -> None:
    with pytest.raises(EngineConfigurationError, match="start the server with them"):
        open_engine(OpenAI(endpoints=("http://x/v1",)), ModelRef(name="m", chat_template="{{ messages }}"))


def test_exact_scoring_leaves_the_key_of_what_was_sampled_before_it_could_be_chosen() -> None:
    assert OpenAI(endpoints=("http://x/v1",), top_logprobs=5).key() == {"kind": "openai", "logprobs": True}
    assert OpenAI(endpoints=("http://x/v1",), scoring="top_logprobs").key()["top_logprobs"] == 20


ADAPTER = LocalModel(
    ref=ModelRef(name="base", digest="b" * 32, adapter="a" * 32), weights="/home/models/b", adapter="/home/models/a"
)
LOADS = OpenAI(endpoints=("http://unused/v1",), loads_adapters=True)


def draw_with(*servers: Server, model: LocalModel = ADAPTER, count: int = 4) -> list[Completion]:
    settings = OpenAI(endpoints=tuple(server.url for server in servers), loads_adapters=True)
    messages = ({"role": "user", "content": "Question"},)
    with OpenAIEngine(settings) as engine:
        engine.use(model)
        return list(engine.sample([Request(key=str(n), messages=messages, seed=n) for n in range(count)], SAMPLING))


def test_an_adapter_is_loaded_into_each_endpoint_before_it_is_asked_for() -> None:
    with serving(lambda number, body: ok()) as one, serving(lambda number, body: ok()) as two:
        for server in (one, two):
            server.models = [{"id": "served-name", "root": "/home/models/b"}]
        assert len(draw_with(one, two)) == 4
        base = LocalModel(ref=ModelRef(name="base", digest="b" * 32), weights="/home/models/b")
        assert len(draw_with(one, model=base, count=1)) == 1
    for server in (one, two):
        loads = [body for body in server.bodies if body["path"] == "/v1/load_lora_adapter"]
        assert loads[0] == {"path": loads[0]["path"], "lora_name": "a" * 32, "lora_path": "/home/models/a"}
        asked = [body["model"] for body in server.bodies if body["path"] == "/v1/chat/completions"]
        assert asked == ["a" * 32] * 2 + ["served-name"] * (server is one)


def test_an_endpoint_with_another_base_or_without_adapters_is_refused_with_what_to_start() -> None:
    with serving(lambda number, body: failing(404, '{"detail": "Not Found"}')) as server:
        server.models = [{"id": "other", "root": "/home/models/c"}]
        with pytest.raises(
            EngineConfigurationError, match=r"serves \['/home/models/c'\], .* `vllm serve /home/models/b`"
        ):
            draw_with(server)
        server.models[0]["root"] = "/home/models/b"
        with pytest.raises(EngineConfigurationError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora"):
            draw_with(server)


def test_an_endpoint_that_was_started_again_is_given_the_adapter_again() -> None:
    loaded: list[int] = []

    def answer(number: int, body: dict[str, Any]) -> Reply:
        if "lora_name" in body:
            loaded.append(number)
            return ok()
        return ok() if len(loaded) > 1 else failing(404, "the model `aaa` does not exist")

    with serving(answer) as server:
        server.models = [{"id": "base", "root": "/home/models/b"}]
        assert len(draw_with(server, count=1)) == 1
    assert len(loaded) == 2
    assert LOADS.key() == OpenAI(endpoints=("http://unused/v1",)).key()  # where adapters are served changes no row
