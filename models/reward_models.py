"""A local reward model in a child process: `run_reward_job` in the parent, `python -m models.reward_models JOB` there.

A reward model is one for sequence classification with a single output. It reads prompt and completion as a policy would
have written them, rendered by models/chat.py.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field

from models.chat import Tokenizer, load_tokenizer, messages_of, render_completion, render_prompt
from models.children import Child, environment, watch_lifeline
from models.specs import PromptTemplate, Settings

Text = tuple[str, str]  # prompt, completion
NO_TOKEN = -1  # the id of none


class RewardModelError(RuntimeError):
    """The reward model could not be loaded or run."""


class RewardJob(Settings):
    """Texts to score, and the model that does it."""

    weights: str  # folder or hub name
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    template: PromptTemplate = PromptTemplate()
    texts: tuple[Text, ...]
    max_length: int = Field(ge=8)  # tokens, prompt and completion
    batch_size: int = Field(ge=1)
    precision: Literal["float32", "bfloat16", "float16"]
    output: Path = Path()  # receives a JSON list


def score_in_child(job: RewardJob, on_line: Callable[[str], None]) -> list[float | None]:
    """A score for each text, in their order; None: it is longer than max_length.

    Raises:
        RewardModelError: the child failed; says how it ended.
    """
    with TemporaryDirectory(prefix="ratchet-rewards-") as folder:
        job = job.model_copy(update={"output": Path(folder) / "scores.json"})
        file = Path(folder) / "job.json"
        file.write_text(job.model_dump_json())
        offline = Path(job.weights).is_dir()
        child = Child(
            ["-m", "models.reward_models", str(file)], environment=environment(offline=offline), on_line=on_line
        )
        try:
            status = child.wait()
        finally:
            child.end()
        if status or not job.output.exists():
            raise RewardModelError(
                f"the reward model {job.weights!r} ended with exit status {status}. Its last lines:\n{child.tail()}"
            )
        scores: list[float | None] = json.loads(job.output.read_text())
        return scores


def main(arguments: Sequence[str]) -> int:
    """The child: score the texts of the job in this file."""
    watch_lifeline()
    job = RewardJob.model_validate_json(Path(arguments[0]).read_text())
    job.output.write_text(json.dumps(score_texts(job)))
    return 0


def score_texts(job: RewardJob) -> list[float | None]:
    """A score for each text, in their order; None: it is longer than max_length.

    Raises:
        ValueError: the model has more than one output.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(job.weights, job.chat_template, job.trust_remote_code, revision=job.revision)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.weights, revision=job.revision, dtype=job.precision, trust_remote_code=job.trust_remote_code
    )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{job.weights!r} has {model.config.num_labels} outputs, a reward model has one; take a model that was "
            "trained to score"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    model.config.get_text_config().pad_token_id = NO_TOKEN  # decoders are scored at the last token that is no padding
    scores: list[float | None] = [None] * len(job.texts)
    for places, ids in _batches(job, tokenizer):
        batch = torch.tensor(ids, device=device)
        with torch.no_grad():
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
        for place, score in zip(places, logits[:, 0].float().tolist(), strict=True):
            scores[place] = score
    return scores


def _batches(job: RewardJob, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Places in the job's texts and token ids, rows of one length together, those too long left out."""
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for place, (prompt, completion) in enumerate(job.texts):
        messages = messages_of(job.template, prompt)
        ids = render_prompt(tokenizer, messages) + render_completion(tokenizer, messages, completion)
        if len(ids) <= job.max_length:
            by_length.setdefault(len(ids), []).append((place, ids))
    for rows in by_length.values():
        for start in range(0, len(rows), job.batch_size):
            batch = rows[start : start + job.batch_size]
            yield [place for place, _ in batch], [ids for _, ids in batch]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
