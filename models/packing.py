"""Several rows in one sequence, so that no step is spent on padding; only where attention keeps them apart."""

from typing import Any

from models.specs import SFT

SQUARES = ("sdpa", "eager")  # attention that works out every pair of tokens, and then masks those of two rows


def pack(rows: Any, max_length: int) -> Any:  # datasets.Dataset
    """The rows put together to sequences of at most `max_length` tokens, none cut (best fit decreasing)."""
    from trl.data_utils import pack_dataset

    return pack_dataset(rows, max_length, strategy="bfd")


def one_at_a_time(settings: SFT, model: Any) -> SFT:
    """The settings, taking packed sequences one by one unless they say otherwise or attention skips other rows.

    TRL lays all sequences of a batch end to end. What that costs grows with the square of their number where attention
    works out whole squares: with eight of 384 tokens, a CPU trained half as fast (benchmarks/bench_training.py). Noise
    on the embeddings keeps its batches, for it is scaled by the length of what goes through at once.
    """
    chosen = settings.per_device_batch_size is not None or settings.embedding_noise is not None
    if chosen or model.config._attn_implementation not in SQUARES:
        return settings
    return settings.model_copy(update={"per_device_batch_size": 1})


def check_walls(model: Any) -> None:
    """Find out by trying whether a packed row can see the row before it.

    Raises:
        ValueError: it can, so the model would be trained on texts that have nothing to do with each other.
    """
    if not keeps_walls(model):
        kind = getattr(model.config, "_attn_implementation", "unknown")
        raise ValueError(
            f"packing is true, but the attention of {type(model).__name__} ({kind}) lets packed rows see each other: "
            "changing one row changed the logits of the next; set packing: false"
        )


def keeps_walls(model: Any) -> bool:
    """Whether the logits of a row are the same whatever row it is packed behind."""
    import torch

    was_training = model.training
    model.eval()
    after_one, after_another = (_logits_of_second(model, first) for first in ([3, 5, 7, 9], [4, 6, 8, 2]))
    model.train(was_training)
    return bool(torch.allclose(after_one, after_another, rtol=1e-4, atol=1e-4 * float(after_one.abs().max())))


def _logits_of_second(model: Any, first: list[int]) -> Any:
    import torch

    second = [2, 3, 4, 5, 6]
    device = next(model.parameters()).device
    ids = torch.tensor([first + second], device=device)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0, len(first) :].float()
