"""Noise on the reference's logits of the rejected side, after DNPO (METHODS 4.4), as a DPOTrainer of TRL 1.16.

TRL's fused head never holds logits, so the rejected side of the reference gets a forward pass of its own here; the loss
itself stays TRL's, which takes given reference log-probs where it finds them. What the paper leaves open is decided
thus: one joint objective, with the gradient turned round where it reaches the noise, so that the same backward pass
widens the margin by the policy and shrinks it by the noise.
"""

from functools import cache
from math import log
from pathlib import Path
from typing import Any

from models.specs import ReferenceNoise

SCALE_FILE = "noise_scale.pt"  # in a checkpoint, so that a resumed training goes on with the scale it had learnt
NOISY = "noisy"  # the column that says whether a pair gets noise


def is_noisy(noise: ReferenceNoise, margin: float | None = None) -> bool:
    """Whether a pair gets noise: all do, or those whose judged margin is small; never one that no judge decided."""
    if noise.below_margin is None:
        return True
    return margin is not None and abs(margin) < noise.below_margin


def noised_log_probs(logits: Any, targets: Any, scale: Any, normal: Any) -> Any:
    """Log-probabilities of the targets under logits + scale * normal.

    Args:
        logits: (..., vocabulary); so are `normal`, draws of the standard normal distribution, and `scale`, which may
            also be a number.
        targets: (...), token ids.
    """
    log_probs = (logits + scale * normal).log_softmax(-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@cache
def scale_class() -> Any:
    """The module that says how large the noise is; made here, since torch is imported late."""
    import torch

    class Reversed(torch.autograd.Function):  # type: ignore[misc] # untyped base
        """The same value forwards, the opposite gradient backwards."""

        @staticmethod
        def forward(context: Any, value: Any) -> Any:
            return value.view_as(value)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return -gradient

    class Scale(torch.nn.Module):  # type: ignore[misc] # untyped base
        """Standard deviations for hidden states: bound * sigmoid(W h + b), which is `scale` everywhere at first."""

        def __init__(self, noise: ReferenceNoise, hidden: int, vocabulary: int) -> None:
            super().__init__()
            assert noise.learned is not None
            self.bound = noise.learned.bound
            self.linear = torch.nn.Linear(hidden, vocabulary)
            share = noise.scale / self.bound
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.constant_(self.linear.bias, log(share / (1 - share)))

        def forward(self, hidden_states: Any) -> tuple[Any, Any]:
            """The scale, through which gradients come back turned round, and its variance, where they do not."""
            scale = self.bound * torch.sigmoid(self.linear(hidden_states.float()))
            return Reversed.apply(scale), scale.square()

    return Scale


@cache
def noisy_reference(trainer_class: Any) -> Any:
    """A subclass of our DPOTrainer whose reference is noised on the rejected side of the pairs marked as noisy."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc] # untyped base
        """TRL's, with the mark of each pair."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            marks = torch.tensor([float(example[NOISY]) for example in examples])
            return {**super().torch_call(examples), NOISY: marks}

    class NoisyReference(trainer_class):  # type: ignore[misc] # untyped base
        """DPOTrainer whose reference log-probs are ours."""

        def __init__(self, *, noise: ReferenceNoise, model: Any, processing_class: Any, **arguments: Any) -> None:
            pad = processing_class.pad_token_id
            collator = Collator(pad_token_id=processing_class.eos_token_id if pad is None else pad)
            super().__init__(model=model, processing_class=processing_class, data_collator=collator, **arguments)
            self.noise = noise
            self.precompute_ref_logps = True  # has TRL's loss read what _compute_loss puts into its inputs
            self.scale = None
            if noise.learned is not None:
                if self.accelerator.num_processes > 1:
                    raise ValueError(
                        "reference_noise.learned is trained in one process only, for nothing keeps its copies alike; "
                        "train on one device or take the fixed scale"
                    )
                config = self.model.config.get_text_config()
                self.scale = scale_class()(noise, config.hidden_size, config.vocab_size).to(self.accelerator.device)

        def create_optimizer(self, *arguments: Any) -> Any:
            optimizer = super().create_optimizer(*arguments)
            if self.scale is not None and self.noise.learned is not None:
                rate = self.noise.learned.learning_rate
                optimizer.add_param_group({"params": list(self.scale.parameters()), "lr": rate, "weight_decay": 0.0})
                optimizer.register_step_post_hook(lambda *_: self.scale.zero_grad())  # Trainer clears the model's only
            return optimizer

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns: list[str] = list(dict.fromkeys([*self._signature_columns, NOISY]))

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            marks = inputs[NOISY]
            inputs = {name: value for name, value in inputs.items() if name != NOISY}
            chosen, rejected, variance = self._reference(inputs, marks)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            told = super()._compute_loss(model, inputs, return_outputs)
            if variance is None or self.noise.learned is None:
                return told
            self._metrics["train"]["reference_noise/scale"].append(variance.sqrt().item())
            penalty = self.noise.learned.penalty * variance
            return (told[0] + penalty, told[1]) if return_outputs else told + penalty

        def _reference(self, inputs: dict[str, Any], marks: Any) -> tuple[Any, Any, Any]:
            """Log-probs of the chosen side, those of the rejected side with noise, and the mean variance if learnt."""
            half = len(marks)  # a batch is [chosen, rejected]
            mask = inputs["completion_mask"][half:, 1:].bool()
            targets = inputs["input_ids"][half:, 1:]
            with torch.no_grad():
                frozen, restore = self._frozen_reference()
                try:
                    chosen, clean = self.compute_ref_log_probs(frozen, inputs)
                    logits, hidden = self._logits(frozen, inputs, half)
                finally:
                    restore()
            scale, variance = (self.noise.scale, None) if self.scale is None else self.scale(hidden)
            log_probs = noised_log_probs(logits, targets, scale, torch.randn_like(logits))
            rejected = torch.where(marks > 0, (log_probs * mask).sum(1), clean)
            if variance is not None:
                counted = (mask * marks.view(-1, 1)).unsqueeze(-1)
                variance = (variance * counted).sum() / (counted.sum().clamp(min=1) * variance.shape[-1])
            return chosen, rejected, variance

        def _frozen_reference(self) -> tuple[Any, Any]:
            """The reference in evaluation mode, so that no embedding noise meant for the policy gets into it."""
            model = self.model if self.ref_model is None else self.ref_model
            was_training = model.training
            model.eval()
            return model, lambda: model.train(was_training)

        def _logits(self, frozen: Any, inputs: dict[str, Any], half: int) -> tuple[Any, Any]:
            from contextlib import nullcontext

            adapter_off = nullcontext()
            if self.ref_model is None:
                from trl.trainer.dpo_trainer import use_adapter

                name = "ref" if "ref" in frozen.peft_config else None
                adapter_off = use_adapter(self.accelerator.unwrap_model(frozen), adapter_name=name)
            with adapter_off, self.accelerator.autocast():
                outputs = frozen(
                    input_ids=inputs["input_ids"][half:],
                    attention_mask=inputs["attention_mask"][half:],
                    use_cache=False,
                    output_hidden_states=True,
                )
            return outputs.logits[:, :-1].float(), outputs.hidden_states[-1][:, :-1].float()

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.scale is not None:
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                torch.save(self.scale.state_dict(), folder / SCALE_FILE)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.scale is not None:
                file = Path(resume_from_checkpoint) / SCALE_FILE
                self.scale.load_state_dict(torch.load(file, weights_only=True))

    return NoisyReference
