"""Builds the tiny base model of the demo: a tokenizer, a small Phi with random weights, then ordinary SFT (TINY.md).

It mirrors phi-2 in small, down to the prompt format, and vLLM loads it like any other model.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from models.jobs import SFTJob, TinyJob, TrainingOutcome
from models.specs import TinyModel
from models.trainers import fit_sft
from models.training_rows import read_columns

PAD, EOS = "<|pad|>", "<|endoftext|>"  # not the same: padding must never look like an end
# Numbers stand alone, and the words beside them take the spaces: "has ", "7", " apples". One form for each number.
PIECES = r"\d+|\n|[^\S\n]?[^\s\d]+[^\S\n](?=\d)|[^\S\n]?[^\s\d]+|\s+"
CHAT_TEMPLATE = (  # phi-2's own format
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Output:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'Instruct: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Output:\\n' }}{% endif %}"
)


def build_tiny(job: TinyJob) -> TrainingOutcome:
    """Train a tokenizer and a small Phi from scratch on the job's demonstrations, into the job's output folder."""
    start = job.checkpoints / "start"
    texts = (
        f"Instruct: {prompt}\nOutput:\n{completion}"
        for prompt, completion in read_columns(job.rows, ("prompt", "completion"))
    )
    save_untrained(job.settings, texts, start)
    return fit_sft(
        SFTJob(
            weights=str(start),
            template=job.template,
            rows=job.rows,
            settings=job.settings.training,
            output=job.output,
            checkpoints=job.checkpoints,
            metrics=job.metrics,
        )
    )


def save_untrained(settings: TinyModel, texts: Iterable[str], folder: Path) -> None:
    """Write the tokenizer, trained on these texts, and the model with the random weights of its seed."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    tokenizer = train_tokenizer(settings, texts)
    torch.manual_seed(settings.training.seed)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            hidden_act="gelu_pytorch_tanh",  # phi-2's gelu_new in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(settings: TinyModel, texts: Iterable[str]) -> Any:  # transformers' class is untyped here
    """A byte-level BPE tokenizer in which small whole numbers are single tokens and nothing is unknown.

    Raises:
        ValueError: the vocabulary is too small for the bytes, the whole numbers and the two special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary, merges = _with_whole_numbers(*_train_words(settings, texts), settings.whole_numbers)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def _train_words(settings: TinyModel, texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of everything that is not a number."""
    import json

    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numbers = max(0, settings.whole_numbers - 10)  # the digits are bytes
    smallest = len(alphabet) + numbers + 2
    if settings.vocabulary < smallest:
        raise ValueError(
            f"vocabulary is {settings.vocabulary}, but {len(alphabet)} bytes, {numbers} whole numbers of two digits "
            f"and more, and 2 special tokens need {smallest}; raise vocabulary or lower whole_numbers"
        )
    words = Tokenizer(BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=settings.vocabulary - numbers,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words.train_from_iterator(_words(texts), trainer)
    trained = json.loads(words.to_str())["model"]
    return trained["vocab"], [(left, right) for left, right in trained["merges"]]


def _words(texts: Iterable[str]) -> Iterator[list[str]]:
    pieces = re.compile(PIECES)
    for text in texts:
        yield [piece for piece in pieces.findall(text) if not piece.isdigit()]


def _with_whole_numbers(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], whole_numbers: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Add 10, 11, ... as tokens, with every merge of two numbers that can lead to them."""
    vocabulary, merges = dict(vocabulary), list(merges)
    for number in range(10, whole_numbers):
        text = str(number)
        vocabulary[text] = len(vocabulary)
        splits = [(text[:place], text[place:]) for place in range(1, len(text))]
        merges.extend(split for split in splits if all(part in vocabulary for part in split))
    return vocabulary, merges
