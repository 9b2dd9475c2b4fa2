"""New chat tokens: put into a tokenizer and a model, and named to an adapter so that their embeddings are trained.

As TRL 1.16 does when it clones a template (METHODS 6.6.2): the new rows of the input embeddings are trainable, and the
head is trained and saved whole, unless the two are one matrix.
"""

from typing import Any

from models.chat import Tokenizer, check_chat
from models.specs import ChatTokens


def add_to_tokenizer(tokenizer: Tokenizer, chat: ChatTokens) -> list[int]:
    """Make the tokenizer speak this chat format; the ids of the tokens it did not know.

    Raises:
        ValueError: the template cannot be used with these tokens.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in chat.tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in chat.tokens], True)
    tokenizer.eos_token = chat.end
    tokenizer.chat_template = chat.template
    if problems := check_chat(tokenizer):
        raise ValueError(f"sft.chat_tokens.template cannot be used: {'; '.join(problems)}")
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in new]


def fit_model(model: Any, tokenizer: Tokenizer, seed: int) -> None:
    """Give the model an embedding for each token, and the tokenizer's end of text; nothing is ever cut off."""
    import torch

    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(seed)  # new rows are drawn around the mean of the old ones
        model.resize_token_embeddings(len(tokenizer))
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id


def train_embeddings(adapter: Any, model: Any, new: list[int]) -> None:  # peft's LoraConfig
    """Have the adapter train the new tokens' embeddings, and the head that is to write them."""
    if not new:
        return
    embeddings = model.get_input_embeddings()
    name = next(name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings)
    adapter.trainable_token_indices = {name: new}
    if not model.config.tie_word_embeddings:
        adapter.modules_to_save = ["lm_head"]
