"""The bare TRL script that bench_training.py compares with: what one would write by hand, and nothing of ours.

    python benchmarks/bare_training.py sft|dpo --model DIR --rows FILE.jsonl --output DIR [--pad-to 384]

Rows are TRL's: prompt and completion, or prompt, chosen and rejected, as messages. The last line printed is JSON.
"""

import argparse
import json
import resource
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def main() -> None:
    """Train, save, and tell how fast it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sft", "dpo"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--pad-to", type=int, help="pad every row to so many tokens (SFT)")
    parser.add_argument("--completions-only", action="store_true", help="have TRL score no prompts, as on a GPU")
    for name in ("steps", "batch", "warmup", "max-length", "logging"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    if options.completions_only and not torch.cuda.is_available():
        from trl.trainer import utils

        utils._use_triton = lambda device: True
    trainer = (sft if options.kind == "sft" else dpo)(options)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(options.output)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    told = {"seconds": seconds, "tokens": logs[-1]["num_tokens"], "loss": logs[-1]["loss"]}
    told["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def sft(options: argparse.Namespace) -> Any:
    """Loss on the completions, which is TRL's default for rows of prompt and completion."""
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
        args=SFTConfig(
            **arguments(options), learning_rate=5e-4, lr_scheduler_type="cosine", pad_to_multiple_of=options.pad_to
        ),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )


def dpo(options: argparse.Namespace) -> Any:
    """DPO with an SFT term, the reference's log-probabilities computed before."""
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
        args=DPOConfig(
            **arguments(options),
            learning_rate=1e-4,
            lr_scheduler_type="linear",
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            beta=0.5,
            precompute_ref_log_probs=True,
        ),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What both have in common."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": f"{options.output}-checkpoints",
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "warmup_steps": options.warmup,
        "max_length": options.max_length,
        "bf16": False,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,
        "save_steps": 200,
        "save_total_limit": 2,
        "logging_steps": options.logging,
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 42,
    }


if __name__ == "__main__":
    main()
