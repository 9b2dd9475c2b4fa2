"""The only module that knows TRL: supervised fine-tuning and preference training of a policy, on our own token ids.

Both run in a child process (models/worker.py). Rows are rendered by models/chat.py, so that a model is trained on the
very ids it is sampled with; TRL's own tokenising, truncating and template handling are not used.
"""

import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from models.chat import (
    Tokenizer,
    load_tokenizer,
    messages_of,
    render_completion,
    render_conversation,
    render_prompt,
)
from models.chat_tokens import add_to_tokenizer, fit_model, train_embeddings
from models.engine import Message
from models.jobs import Job, PolicyJob, PreferenceJob, SFTJob, TrainingOutcome
from models.noise import is_noisy, noisy_reference
from models.packing import check_walls, one_at_a_time, pack
from models.specs import Optimization
from models.training_callbacks import WHOLE, last_whole_checkpoint, recorder, sealer
from models.training_rows import read_chats, read_columns, read_sides

logger = logging.getLogger("models.trainers")

TOO_LONG = "longer than max_length"
REWRITTEN = "earlier replies that the template renders otherwise later on, not trained on"
SCHEDULES = {"trapezoid": "warmup_stable_decay"}  # where transformers has another name
OPTIMIZERS = {"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}
KEPT_CHECKPOINTS = 2  # one may be torn


class Batching(NamedTuple):
    """How the global batch is split."""

    per_device: int
    accumulation: int
    optimizer_steps: int


def fit_sft(job: SFTJob) -> TrainingOutcome:
    """Fine-tune on demonstrations, the loss being on the completion and the token that ends it only.

    Raises:
        ValueError: no row is short enough, or the batch cannot be split as declared.
    """
    from trl import SFTConfig, SFTTrainer

    _score_completions_only()
    tokenizer = load_tokenizer(job.weights, job.chat_template, job.trust_remote_code, revision=job.revision)
    settings = job.settings
    new_tokens = add_to_tokenizer(tokenizer, settings.chat_tokens) if settings.chat_tokens else []
    rows, dropped = sft_rows(job, tokenizer)
    model, adapter, dataset = _starting_model(job, settings), _new_adapter(job, settings), _dataset(rows)
    if settings.chat_tokens is not None:
        fit_model(model, tokenizer, settings.seed)
    if adapter is not None:
        train_embeddings(adapter, model, new_tokens)
    if settings.packing:
        check_walls(model)
        dataset, settings = pack(dataset, settings.max_length), one_at_a_time(settings, model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_arguments(job, settings, len(dataset)),
            max_length=settings.max_length,
            packing=settings.packing,
            packing_strategy="bfd",
            padding_free=settings.packing,
            loss_type="nll",
            completion_only_loss=True,
            neftune_noise_alpha=settings.embedding_noise,
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows hold input_ids and labels
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    held_out = {task: _dataset(rows) for task, rows in held_out_rows(job, tokenizer).items()}
    return _train(trainer, job, job.settings, len(rows), dropped, held_out)


def fit_preferences(job: PreferenceJob) -> TrainingOutcome:
    """Train on pairs against the policy as it starts; dropout is off, also a LoRA's (TRL's default for DPO).

    Raises:
        ValueError: no pair is short enough, or the batch cannot be split as declared.
    """
    from trl import DPOConfig

    settings = job.settings
    _score_completions_only()
    tokenizer = load_tokenizer(job.weights, job.chat_template, job.trust_remote_code, revision=job.revision)
    rows, dropped = preference_rows(job, tokenizer)
    arguments = _arguments(job, settings, len(rows)) | {"optim": OPTIMIZERS[settings.optimizer]}
    precompute = settings.precompute_reference and settings.reference_noise is None  # noise is drawn afresh each time
    needs_a_copy = settings.lora is None and not precompute
    trainer_class, noise = _dpo_trainer(), settings.reference_noise
    trainer = (trainer_class if noise is None else partial(noisy_reference(trainer_class), noise=noise))(
        model=_starting_model(job, settings),
        ref_model=_starting_model(job, settings) if needs_a_copy else None,  # LoRA: the adapter is switched off instead
        args=DPOConfig(
            **arguments,
            max_length=settings.max_length,
            padding_free=False,
            loss_type=list(settings.loss_type),
            loss_weights=list(settings.loss_weights) if settings.loss_weights else None,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            precompute_ref_log_probs=precompute,
            disable_dropout=True,
            neftune_noise_alpha=settings.embedding_noise,
        ),
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
        peft_config=_new_adapter(job, settings),
    )
    return _train(trainer, job, settings, len(rows), dropped)


def sft_rows(job: SFTJob, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of input_ids and labels, -100 on the prompt, and how many were dropped by reason.

    Raises:
        ValueError: no row is left.
    """
    kept, dropped = [], Counter[str]()
    for messages in read_chats(job.rows, job.template):
        row, rewritten = _sft_row(job, tokenizer, messages)
        dropped[REWRITTEN] += rewritten
        if row is None:
            dropped[TOO_LONG] += 1
        else:
            kept.append(row)
    _check_some_left(job, len(kept), dropped)
    return kept, +dropped


def held_out_rows(job: SFTJob, tokenizer: Tokenizer) -> dict[str, list[dict[str, Any]]]:
    """The rows of each task that are not trained on, as `sft_rows` makes them; those too long are left out."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for task, prompt, completion in read_columns(job.held_out, ("task", "prompt", "completion")):
        messages = (*messages_of(job.template, prompt), {"role": "assistant", "content": completion})
        row, _ = _sft_row(job, tokenizer, messages)
        if row is not None:
            tasks.setdefault(task, []).append(row)
    return dict(sorted(tasks.items()))


def preference_rows(job: PreferenceJob, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of prompt_ids, chosen_ids and rejected_ids, and how many were dropped by reason.

    Raises:
        ValueError: no row is left.
    """
    import numpy as np

    kept, dropped = [], Counter[str]()
    noise = job.settings.reference_noise
    judged = ("margin",) if noise is not None and noise.below_margin is not None else ()
    for messages, chosen, rejected, margin in read_sides(job.rows, job.template, judged):
        prompt_ids = render_prompt(tokenizer, messages)
        sides = [render_completion(tokenizer, messages, text) for text in (chosen, rejected)]
        if len(prompt_ids) + max(map(len, sides)) > job.settings.max_length:
            dropped[TOO_LONG] += 1
            continue
        columns = zip(("prompt_ids", "chosen_ids", "rejected_ids"), (prompt_ids, *sides), strict=True)
        row: dict[str, Any] = {name: np.array(ids, np.int32) for name, ids in columns}
        kept.append(row if noise is None else row | {"noisy": is_noisy(noise, *margin)})
    _check_some_left(job, len(kept), dropped)
    return kept, dropped


def split_batch(settings: Optimization, rows: int, devices: int) -> Batching:
    """How the declared global batch is reached on these devices, and how many optimizer steps that makes.

    Raises:
        ValueError: the global batch is not a multiple of what the devices take at once.
    """
    per_device = settings.per_device_batch_size or max(1, settings.global_batch_size // devices)
    at_once = per_device * devices
    if settings.global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size is {settings.global_batch_size}, but {devices} devices x {per_device} rows "
            f"(per_device_batch_size) take {at_once} at once, which does not divide it; change one of the two"
        )
    accumulation = settings.global_batch_size // at_once
    steps_an_epoch = math.ceil(math.ceil(rows / at_once) / accumulation)
    steps = settings.max_steps or math.ceil(settings.epochs * steps_an_epoch)
    return Batching(per_device, accumulation, steps)


def _sft_row(job: SFTJob, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[dict[str, Any] | None, int]:
    """The row, or None if it is too long, and how many earlier replies are not trained on."""
    import numpy as np

    ids, trained, rewritten = render_conversation(tokenizer, messages)
    if len(ids) > job.settings.max_length:
        return None, 0
    labels = [token if train else -100 for token, train in zip(ids, trained, strict=True)]
    return {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}, rewritten


def _check_some_left(job: PolicyJob, kept: int, dropped: Counter[str]) -> None:
    if not kept:
        names = ", ".join(str(file) for file in job.rows)
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items()) or "the files hold none"
        raise ValueError(f"no row of {names} is left to train on ({reasons}); raise max_length or check the rows")


def _dataset(rows: list[dict[str, Any]]) -> Any:  # datasets.Dataset
    from datasets import Dataset

    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def _devices() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch


def _arguments(job: Job, settings: Optimization, rows: int) -> dict[str, Any]:
    """Training arguments in full: TRL's defaults differ from transformers' and are set explicitly."""
    import torch

    batching = split_batch(settings, rows, _devices())
    cuda = torch.cuda.is_available()
    if settings.precision == "float16" and not cuda:
        raise ValueError("precision is 'float16', which trains on a GPU only, and there is none; use float32")
    return {
        "output_dir": str(job.checkpoints),
        "per_device_train_batch_size": batching.per_device,
        "per_device_eval_batch_size": batching.per_device,
        "gradient_accumulation_steps": batching.accumulation,
        "max_steps": batching.optimizer_steps,
        "learning_rate": settings.learning_rate,
        **_schedule(settings, batching.optimizer_steps),
        "optim": "adamw_torch_fused",
        "weight_decay": settings.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bfloat16",
        "fp16": settings.precision == "float16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_strategy": "steps",
        "logging_steps": max(1, min(25, batching.optimizer_steps // 20)),
        "logging_first_step": True,
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
        "push_to_hub": False,
    }


def _schedule(settings: Optimization, optimizer_steps: int) -> dict[str, Any]:
    """Learning-rate schedule, every length in optimizer steps."""
    warmup = round(settings.warmup_ratio * optimizer_steps)
    decay = min(round(settings.decay_ratio * optimizer_steps), optimizer_steps - warmup)
    return {
        "lr_scheduler_type": SCHEDULES.get(settings.schedule, settings.schedule),
        "lr_scheduler_kwargs": {"num_decay_steps": decay, "decay_type": "linear"}
        if settings.schedule == "trapezoid"
        else None,
        "warmup_steps": warmup,
    }


def _load_weights(job: PolicyJob, dtype: str) -> Any:  # transformers' model class
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        job.weights, revision=job.revision, dtype=dtype, trust_remote_code=job.trust_remote_code
    )


def _starting_model(job: PolicyJob, settings: Optimization) -> Any:
    """The policy as it starts. Weights to train are float32; a LoRA's frozen base is in the chosen precision."""
    if job.adapter is None:
        return _load_weights(job, "float32" if settings.lora is None else settings.precision)
    from peft import PeftModel

    if _continues_adapter(job, settings):
        return PeftModel.from_pretrained(_load_weights(job, settings.precision), job.adapter, is_trainable=True)
    return _merged(_load_weights(job, "float32"), job.adapter)


def _merged(base: Any, adapter: Path) -> Any:
    """A model with an adapter merged in; peft leaves it frozen, and it may have to be trained."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).merge_and_unload().requires_grad_(True)


def _continues_adapter(job: PolicyJob, settings: Optimization) -> bool:
    """Whether the same adapter is trained further, which is so when the result is to be an adapter on the same base."""
    return job.adapter is not None and settings.lora is not None and not settings.lora.merge


def _new_adapter(job: PolicyJob, settings: Optimization) -> Any:  # peft's configuration class
    if settings.lora is None or _continues_adapter(job, settings):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=list(settings.lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


@cache
def _dpo_trainer() -> Any:
    from trl import DPOTrainer

    class OnOurIds(DPOTrainer):  # type: ignore[misc] # untyped base
        """DPOTrainer tokenises again whatever it is given; our rows hold prompt_ids, chosen_ids and rejected_ids."""

        def _prepare_dataset(self, dataset: Any, *_arguments: Any) -> Any:
            return dataset

    return OnOurIds


def _train(
    trainer: Any,
    job: PolicyJob,
    settings: Optimization,
    rows: int,
    dropped: Counter[str],
    held_out: Mapping[str, Any] | None = None,  # task -> datasets.Dataset
) -> TrainingOutcome:
    from transformers import PrinterCallback

    belongs_to = {"settings": settings.key(), "rows": rows, "template": job.template.key()}
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder()(job.metrics))
    trainer.add_callback(sealer()(trainer, belongs_to))
    checkpoint = last_whole_checkpoint(job.checkpoints, belongs_to) if trainer.is_world_process_zero() else None
    checkpoint = _from_first_process(checkpoint)
    if checkpoint:
        trainer._total_train_tokens = json.loads((checkpoint / WHOLE).read_text())["tokens"]  # TRL starts again at 0
    if checkpoint is None:
        job.metrics.unlink(missing_ok=True)  # of an attempt that left no checkpoint
        _log_held_out(trainer, job, held_out or {})
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started
    _log_held_out(trainer, job, held_out or {})
    _save(trainer, job, settings)
    return TrainingOutcome(
        optimizer_steps=trainer.state.global_step,
        rows=rows,
        dropped=dict(dropped),
        tokens=int(trainer._total_train_tokens),
        seconds=seconds,
        metrics=job.metrics,
    )


def _log_held_out(trainer: Any, job: PolicyJob, held_out: Mapping[str, Any]) -> None:
    """Add the loss of each task on rows that are not trained on to the metrics: "eval_loss/<task>"."""
    for task, rows in held_out.items():
        loss = trainer.evaluate(rows)["eval_loss"]
        if trainer.is_world_process_zero():
            job.metrics.parent.mkdir(parents=True, exist_ok=True)
            with job.metrics.open("a") as lines:
                row = {"optimizer_step": trainer.state.global_step, "name": f"eval_loss/{task}", "value": loss}
                lines.write(json.dumps(row) + "\n")
            logger.info("optimizer step %d: %s, held-out loss %.4f", trainer.state.global_step, task, loss)


def _score_completions_only() -> None:
    """On a CPU, TRL's fused head scores prompts and padding too, only to mask them: 40 % of a tiny model's step.

    It scores the completions only where Triton is; this makes it do so here. The loss is the same.
    """
    import torch
    from trl.trainer import utils

    if not torch.cuda.is_available():
        utils._use_triton = lambda device: True


def _from_first_process(value: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def _save(trainer: Any, job: PolicyJob, settings: Optimization) -> None:
    """Write model and tokenizer only, so that the folder's digest depends on the training and nothing else."""
    merge = settings.lora is not None and settings.lora.merge
    folder = job.checkpoints / "adapter" if merge else job.output
    for name in ("is_local", "local_files_only"):  # how the tokenizer was loaded is no part of it
        trainer.processing_class.init_kwargs.pop(name, None)
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    if merge:
        _merge(job, folder, trainer.processing_class)
        trainer.processing_class.save_pretrained(job.output)
    elif settings.lora is not None:
        _make_adapter_reproducible(folder, job.weights)
    for name in ("training_args.bin", "README.md"):
        (job.output / name).unlink(missing_ok=True)
    shutil.rmtree(job.output / "ref", ignore_errors=True)  # DPO's frozen copy of an adapter that was trained further


def _merge(job: PolicyJob, adapter: Path, tokenizer: Tokenizer) -> None:
    base = _load_weights(job, "float32")
    if job.adapter is not None:
        base = _merged(base, job.adapter)
    if isinstance(job, SFTJob) and job.settings.chat_tokens is not None:
        fit_model(base, tokenizer, job.settings.seed)
    _merged(base, adapter).save_pretrained(job.output)


def _make_adapter_reproducible(folder: Path, weights: str) -> None:
    """peft writes sets in the order of their hashes, and the path of the base, which is another on each machine."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = None if Path(weights).is_dir() else weights
    file.write_text(json.dumps(config, indent=2, sort_keys=True))
