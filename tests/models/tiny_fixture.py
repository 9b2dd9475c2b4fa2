"""A Phi model of about 250,000 random weights with a tokenizer and a chat template, built in a second."""

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'Instruct: ' + message['content'] + '\nOutput:\n' }}{% endif %}"
    "{% endfor %}"
)
CORPUS = [
    f"Instruct: {name} has {first} {thing}, buys {second} more. How many {thing} has {name} now?\nOutput:\n"
    f"{first} + {second} = {first + second}\nFINAL ANSWER: {first + second}"
    for name in ("Ann", "Bob", "Cem")
    for thing in ("apples", "coins", "books")
    for first in range(1, 31)
    for second in range(1, 31)
]


def save_tokenizer(folder: Path, *, chat_template: str | None = TEMPLATE) -> None:
    """Save a byte-level BPE tokenizer of about 500 tokens, with its chat template, into the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_tiny_model(folder: Path, *, seed: int, chat_template: str | None = TEMPLATE) -> Path:
    """Save a tiny Phi model with random weights of this seed, and its tokenizer; returns the folder."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, chat_template=chat_template)
    config = PhiConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=256,
        partial_rotary_factor=0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,  # large, so that greedy decoding does not repeat one token for ever
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        PhiForCausalLM(config).save_pretrained(folder)
    return folder
