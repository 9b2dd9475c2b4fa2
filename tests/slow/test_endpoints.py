"""Two real vLLM servers: policies of ours on both, and what is sampled over both when one is killed half-way."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from flows.bases import TinyBase, open_base
from flows.presets import Preset
from flows.rest_em import RestEM, rest_em
from models.specs import VLLM, EngineSettings, ModelRef, OpenAI, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.home import home
from storage.rows import Prompt, Rollout
from tasks.loading import open_folder
from tasks.recording import Progress, listening
from tasks.sampling import sample_rollouts
from tasks.serving import close_engines
from tests.faults.harness import in_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REAL = Path(__file__).parents[1] / "faults" / "real.yaml"  # its model knows 24 problems by heart, after seconds
LENGTH, RANK = 128, 8
ONE_CORE_EACH = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
GREEDY = Sampling(rollouts_per_prompt=1, temperature=0.0, top_k=-1, max_completion_tokens=32, prompts_per_shard=12)
LORA = "sft.lora={rank: 8, alpha: 16, merge: false, target_modules: [q_proj, v_proj, dense, fc1, fc2]}"


class Server(NamedTuple):
    """A vLLM server of its own."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def served(self) -> float:
        """Requests it has answered, as it counts them itself."""
        told = httpx.get(f"{self.url.removesuffix('/v1')}/metrics").text
        return sum(map(float, re.findall(r"^vllm:request_success_total{.*} ([0-9.e+]+)$", told, re.MULTILINE)))

    def kill(self) -> None:
        """End it and its engine at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that endpoints serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(tmp_path_factory.mktemp("base") / "home"))
        config = Preset(REAL).config(RestEM)
        assert isinstance(config.base, TinyBase)
        return home() / "models" / str(open_base(config.base, config.template, config.marker).digest)


@pytest.fixture(scope="module")
def servers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers that load adapters, and serve the base as `tiny` too."""
    with _served(base, tmp_path_factory.mktemp("servers"), count=2) as started:
        yield started


@contextmanager
def _served(base: Path, folder: Path, *, count: int) -> Iterator[list[Server]]:
    started: list[Server] = []
    try:
        for number in range(count):
            started.append(_start(base, folder / f"{number}.log"))
        for server in started:
            _wait_for(server)
        yield started
    finally:
        for server in started:
            if server.process.poll() is None:
                server.kill()


def _start(base: Path, log: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--model", str(base), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "16", "--enforce-eager"]
    options += ["--enable-lora", "--max-lora-rank", str(RANK)]
    ours = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            env={**os.environ, **ONE_CORE_EACH, **ours},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}/v1", process, log)


def _wait_for(server: Server, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url.removesuffix('/v1')}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{server.log.read_text()[-3000:]}")


def endpoints(servers: Sequence[Server], *, loads_adapters: bool) -> OpenAI:
    urls = tuple(server.url for server in servers)
    return OpenAI(endpoints=urls, concurrency=8, loads_adapters=loads_adapters)


def prompts(count: int) -> DatasetRef:
    rows = (
        Prompt(
            prompt_id=f"p{n}", source="tests", prompt=f"Ann has {n} apples, buys {n + 2} more. How many?", answer="1"
        )
        for n in range(count)
    )
    return write_rows(rows, Prompt, step="prompts")


def texts(policy: ModelRef, asked: DatasetRef, sampling: Sampling, engine: EngineSettings) -> list[str]:
    rows = read_rows(sample_rollouts(policy, asked, PromptTemplate(), sampling, engine), Rollout)
    return [row.completion for row in rows]


def test_a_recipe_trains_on_two_endpoints_that_serve_its_policies_like_our_own_engine(
    base: Path, servers: list[Server], ratchet_home: Path
) -> None:
    urls = ", ".join(server.url for server in servers)
    engine = f"engine={{kind: openai, endpoints: [{urls}], concurrency: 8, loads_adapters: true}}"
    config = Preset(REAL, [f"base={{name: {base}}}", engine, LORA]).config(RestEM)
    policy = rest_em.fn(config)
    assert policy.adapter is not None
    assert policy.digest == open_folder(ModelRef(name=str(base))).digest
    for server in servers:
        known = [model["id"] for model in httpx.get(f"{server.url}/models").json()["data"]]
        assert policy.adapter in known
        assert server.served() > 20
    start = policy.model_copy(update={"adapter": None})
    ours = VLLM(max_model_len=LENGTH, max_num_seqs=16, dtype="float32", max_lora_rank=RANK)
    theirs, asked = endpoints(servers, loads_adapters=True), prompts(24)
    trained, untrained = (texts(model, asked, GREEDY, theirs) for model in (policy, start))
    assert trained != untrained
    assert texts(policy, asked, GREEDY, ours) == trained
    assert texts(start, asked, GREEDY, ours) == untrained


def test_when_one_of_two_endpoints_is_killed_half_way_each_rollout_is_drawn_once(
    servers: list[Server], ratchet_home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed, survivor = servers
    before, answered = [server.served() for server in servers], list[float]()
    killing = threading.Lock()

    def kill_half_way(event: object) -> None:
        if isinstance(event, Progress) and event.done >= 120 and killing.acquire(blocking=False):
            answered.append(doomed.served() - before[0])
            doomed.kill()

    sampling = Sampling(
        rollouts_per_prompt=8, temperature=1.0, top_k=-1, max_completion_tokens=64, prompts_per_shard=15
    )
    asked, policy = prompts(60), ModelRef(name="tiny")
    with caplog.at_level(logging.WARNING, "ratchet.openai"), listening(kill_half_way):
        drawn = texts(policy, asked, sampling, endpoints(servers, loads_adapters=False))
    assert len(drawn) == 480
    counts = in_ledger(ratchet_home)
    wanted = {(f"p{n}", index) for n in range(60) for index in range(8)}
    assert Counter(counts.values()) == {1: 480}
    assert {key[3:] for key in counts} == wanted
    assert 0 < answered[0] < 480
    assert survivor.served() - before[1] >= 480 - answered[0] - 16  # those in flight when it died were drawn again
    assert [record.getMessage() for record in caplog.records if "dropped endpoint" in record.getMessage()]
    assert f"dropped endpoint {doomed.url}" in caplog.text and f"dropped endpoint {survivor.url}" not in caplog.text

    close_engines()
    monkeypatch.setenv("RATCHET_HOME", str(ratchet_home.with_name("drawn by one")))
    prompts(60)
    assert texts(policy, asked, sampling, endpoints([survivor], loads_adapters=False)) == drawn
