"""lm-eval's benchmarks on the vLLM engine: lm-eval's own transformers backend says what is right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import harness
from models.engine import LocalModel
from models.ifeval_libraries import prepare_ifeval
from models.specs import VLLM, ModelRef, PromptTemplate
from models.vllm_engine import VLLMEngine
from storage.benchmark_files import local_splits
from tasks.benchmarking import _parts, _read, _task_of
from tasks.benchmarks import KNOWN, Benchmark
from tests.benchmark_documents import write_documents
from tests.models.tiny_fixture import save_tiny_model

pytestmark = pytest.mark.vllm

CONTEXT = 2048
GENERATED = 24  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds five worked examples; its rotary positions need no weights."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    with VLLMEngine(VLLM(max_model_len=CONTEXT, max_num_seqs=64)) as engine:
        engine.use(LocalModel(ref=ModelRef(name="tiny"), weights=str(folder)))
        yield engine


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """lm-eval's own backend on the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8, max_length=CONTEXT)


@pytest.fixture(autouse=True)
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_documents(tmp_path / "documents")
    monkeypatch.setenv("RATCHET_DATA", str(root))
    return root


def task_of(name: str, shots: int) -> harness.TaskToRun:
    of_group = name.startswith("mmlu")
    settings = {"task": "mmlu"} if of_group else {"task": name, "max_completion_tokens": GENERATED}
    benchmark = Benchmark.model_validate({**settings, "shots": shots, "limit": 6})
    return next(_task_of(benchmark, part) for part in _parts(benchmark) if part.task == name)


def evaluated_by_lm_eval(task: harness.TaskToRun, reference: Any, *, chat: bool) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    loaded = harness._load(task)
    if loaded.OUTPUT_TYPE == "generate_until":
        loaded.set_config(key="generation_kwargs", value={"max_gen_toks": GENERATED}, update=True)
    tasks = {"tasks": {task.name: loaded}, "groups": {}}
    found: dict[str, Any] = evaluate(
        reference, tasks, limit=task.limit, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return found


@pytest.mark.parametrize("chat", [True, False], ids=["chat template", "plain text"])
@pytest.mark.parametrize(
    ("name", "shots"),
    [
        ("gsm8k", 5),
        ("ifeval", 0),
        ("mmlu_astronomy", 2),
        ("truthfulqa_mc1", 0),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("hellaswag", 3),
        ("arc_easy", 0),
        ("arc_challenge", 4),
    ],
)
def test_figures_and_log_probabilities_are_those_of_lm_evals_own_backend(
    name: str, shots: int, chat: bool, engine: VLLMEngine, reference: Any
) -> None:
    if name == "ifeval":
        pytest.importorskip("langdetect", reason="IFEval needs langdetect: pip install 'lm-eval[ifeval]'")
        prepare_ifeval([], may_download=False)
    task = task_of(name, shots)
    answers = harness.run_task(task, engine, PromptTemplate() if chat else None)
    expected = evaluated_by_lm_eval(task, reference, chat=chat)
    samples = expected["samples"][name]
    assert len(answers) == len(samples) > 0
    for answer, sample in zip(answers, samples, strict=True):
        assert (answer.document, answer.filter, answer.cut_tokens) == (sample["doc_id"], sample["filter"], 0)
        given = [responses[0] for responses in sample["resps"]]
        if answer.completions:
            assert answer.completions == [text.rstrip("\ufffd") for text in given]  # half a character at the cut
        else:
            assert answer.logprobs == pytest.approx([logprob for logprob, _ in given], abs=1e-3)
    for place, metric in enumerate(answers[0].metrics):
        for filter_ in {answer.filter for answer in answers}:
            read = [answer for answer in answers if answer.filter == filter_]
            total = sum(answer.values[place] * answer.weights[place] for answer in read)
            ours = total / sum(answer.weights[place] for answer in read)
            assert ours == pytest.approx(expected["results"][name][f"{metric},{filter_}"], abs=1e-6)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_told(engine: VLLMEngine, documents: Path) -> None:
    known = KNOWN["arc_easy"]
    (file,) = [
        path for split, path in local_splits(known.hub, known.config, config_optional=True).items() if split == "test"
    ]
    first, *others = file.read_text().splitlines(keepends=True)
    long = json.loads(first) | {"question": "Is it " + "so very long " * 800 + "?"}
    file.write_text(json.dumps(long) + "\n" + "".join(others))
    answers = harness.run_task(task_of("arc_easy", 0), engine, None)
    assert [answer.cut_tokens > 0 for answer in answers] == [True, False, False, False, False, False]
    assert _read({"test": file})["test"][0]["question"].startswith("Is it so very")
