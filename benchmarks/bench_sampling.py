"""Rollouts per second through `sample_rollouts`, ledger and data set included, against bare `vllm.LLM.generate`.

    python benchmarks/bench_sampling.py [--prompts 400] [--rounds 2] [--model FOLDER]

Same model, prompts, decoding and engine settings; each side in a process of its own, in turn, the best round of each.
Without --model, a tiny Phi with random weights on a CPU, whose rollouts all have the same length.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from tables import show, told_by

from models.chat import load_tokenizer, messages_of, render_prompt
from models.specs import VLLM, ModelRef, PromptTemplate, Sampling, TinyModel

ROLLOUTS = 8
SAMPLING = Sampling(rollouts_per_prompt=ROLLOUTS, temperature=1.0, top_k=-1, max_completion_tokens=48)
ENGINE = VLLM(max_model_len=256, max_num_seqs=512)
SMALL = (16, 4)  # prompts a call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sys.stdout.write("\n" + json.dumps(SIDES[options.side](options.model, options.prompts)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _tiny(Path(folder))
        told = [(_apart("ours", model, options.prompts), _apart("bare", model, options.prompts))
                for _ in range(options.rounds)]  # fmt: skip
    ours, bare = ({name: _best(name, [one[n] for one in told]) for name in told[0][n]} for n in (0, 1))
    rows = [("ours / one call of LLM.generate, rollouts per second", f"{ours['rate'] / bare['rate']:.2f}")]
    for size in SMALL:
        what = f"ours / LLM.generate called with {size} prompts at a time"
        rows.append((what, f"{ours['rate'] / bare[f'rate {size}']:.2f}"))
    rows.append(("start to first rollout, ours / bare vLLM", f"{ours['first'] / bare['first']:.2f}"))
    notes = [
        f"ours: {ours['rate']:,.0f} rollouts a second, first one after {ours['first']:.1f} s",
        f"{options.prompts:,} prompts, {ROLLOUTS} rollouts each, best of {options.rounds} rounds",
    ]
    show("Sampling", rows, *notes)


def ours(model: Path, count: int) -> dict[str, float]:
    """Through the step, without Prefect."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["RATCHET_HOME"] = home
        from storage.datasets import write_rows
        from storage.rows import Prompt
        from tasks.loading import open_folder
        from tasks.sampling import sample_rollouts
        from tasks.serving import close_engines

        def draw(prompts: list[str], seed: int) -> None:
            rows = (
                Prompt(prompt_id=f"{n:032x}", source="", prompt=text, answer=None) for n, text in enumerate(prompts)
            )
            asked, sampling = write_rows(rows, Prompt, step="prompts"), SAMPLING.model_copy(update={"seed": seed})
            sample_rollouts(policy, asked, PromptTemplate(), sampling, ENGINE)

        policy = open_folder(ModelRef(name=str(model)))
        try:
            draw(_prompts(1), 1)
            told = {"first": _age()}
            return told | {"rate": _rate(lambda: draw(_prompts(count), 2), count)}
        finally:
            close_engines()


def bare(model: Path, count: int) -> dict[str, float]:
    """vLLM by itself, all prompts in one call and then few at a time."""
    from models.vllm_engine import _variables

    os.environ |= _variables(ENGINE)
    from vllm import LLM, SamplingParams

    tokenizer = load_tokenizer(str(model), None, False)
    llm = LLM(
        str(model),
        dtype="float32",
        max_model_len=ENGINE.max_model_len,
        max_num_seqs=ENGINE.max_num_seqs,
        enforce_eager=True,
        enable_chunked_prefill=False,
        disable_log_stats=True,
    )

    def draw(prompts: list[str], seed: int, at_once: int) -> None:
        tokens = [render_prompt(tokenizer, messages_of(PromptTemplate(), prompt)) for prompt in prompts]
        decoding = SamplingParams(n=ROLLOUTS, seed=seed, temperature=1.0, top_k=-1, max_tokens=48, logprobs=0)
        for start in range(0, len(tokens), at_once):
            asked: list[Any] = [{"prompt_token_ids": one} for one in tokens[start : start + at_once]]
            llm.generate(asked, decoding, use_tqdm=False)

    draw(_prompts(1), 1, 1)
    told = {"first": _age(), "rate": _rate(lambda: draw(_prompts(count), 2, count), count)}
    few = max(SMALL) * 4
    return told | {f"rate {size}": _rate(lambda size=size: draw(_prompts(few), 3, size), few) for size in SMALL}


def _prompts(count: int) -> list[str]:
    return [f"Ann has {number} apples and buys {number + 3} more. How many has she now?" for number in range(count)]


def _rate(work: Callable[[], None], prompts: int) -> float:
    started = time.perf_counter()
    work()
    return prompts * ROLLOUTS / (time.perf_counter() - started)


def _age() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def _best(name: str, told: list[dict[str, float]]) -> float:
    return (min if name == "first" else max)(one[name] for one in told)


def _tiny(folder: Path) -> Path:
    from models.tiny import save_untrained

    save_untrained(TinyModel(), _texts(), folder / "model")
    return folder / "model"


def _texts() -> Iterator[str]:
    return (f"Instruct: {text}\nOutput:\n1 + 2 = 3\nFINAL ANSWER: 3" for text in _prompts(500))


def _apart(side: str, model: Path, prompts: int) -> dict[str, float]:
    return told_by(__file__, "--side", side, "--model", str(model), "--prompts", str(prompts), limit_seconds=900)


SIDES: dict[str, Callable[[Path, int], dict[str, float]]] = {"ours": ours, "bare": bare}

if __name__ == "__main__":
    main()
