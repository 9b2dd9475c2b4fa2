"""The chat renderer: one rendering for sampling and for training."""

import re
from pathlib import Path

import pytest

from models.chat import (
    Tokenizer,
    check_chat,
    end_of_turn,
    load_tokenizer,
    messages_of,
    render_completion,
    render_prompt,
    render_scored,
    token_texts,
)
from models.engine import PLAIN, EngineConfigurationError
from models.specs import PromptTemplate
from tests.models.tiny_fixture import TEMPLATE, save_tokenizer

pytestmark = pytest.mark.vllm  # importing transformers alone takes longer than the unit tier may

QUESTION = ({"role": "user", "content": "What is 3 + 4?"},)
CHAT_ML = (
    "{% for m in messages %}{{ '<|pad|>' + m['role'] + '\n' + m['content'] | trim + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder), None, False)


def test_messages_keep_a_dollar_sign_inside_the_prompt() -> None:
    template = PromptTemplate(system="Costs are in $$.", user="Q: $prompt")
    assert messages_of(template, "A pen is $prompt or $5?") == (
        {"role": "system", "content": "Costs are in $."},
        {"role": "user", "content": "Q: A pen is $prompt or $5?"},
    )


def test_unknown_placeholder_is_named() -> None:
    with pytest.raises(ValueError, match=r"placeholder other than \$prompt \('question'\)"):
        messages_of(PromptTemplate(user="$prompt $question"), "x")


def test_rendered_turns_decode_to_the_template_text(tokenizer: Tokenizer) -> None:
    prompt, completion = render_prompt(tokenizer, QUESTION), render_completion(tokenizer, QUESTION, "7")
    assert tokenizer.decode(prompt) == "Instruct: What is 3 + 4?\nOutput:\n"
    assert tokenizer.decode(completion) == "7<|endoftext|>"
    assert completion[-1] == end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_completion_ids_do_not_depend_on_the_prompt(tokenizer: Tokenizer) -> None:
    other = ({"role": "user", "content": "Say it: "},)
    assert render_completion(tokenizer, QUESTION, " 3 + 4 = 7") == render_completion(tokenizer, other, " 3 + 4 = 7")


def test_what_follows_the_end_of_the_turn_is_dropped_and_the_completion_is_not_trimmed(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), CHAT_ML, False)
    assert tokenizer.decode(render_completion(tokenizer, QUESTION, " 7\n")) == " 7\n<|endoftext|>"


def test_special_tokens_inside_a_completion_do_not_cut_it(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), CHAT_ML, False)
    assert tokenizer.decode(render_completion(tokenizer, QUESTION, "a<|pad|>b")) == "a<|pad|>b<|endoftext|>"


def test_reasoning_block_that_a_template_inserts_is_not_trained(folder: Path) -> None:
    template = TEMPLATE.replace("{{ message['content'] }}", "{{ '<think></think>' + message['content'] }}")
    tokenizer = load_tokenizer(str(folder), template, False)
    assert tokenizer.decode(render_completion(tokenizer, QUESTION, "7")) == "7<|endoftext|>"


def test_date_in_a_template_is_pinned(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE, False)
    assert tokenizer.decode(render_prompt(tokenizer, QUESTION)).startswith("2024-07-26Instruct")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        pytest.param(TEMPLATE.replace("{{ eos_token }}", ""), "never learn to stop", id="no end of turn"),
        pytest.param("{{ bos_token + bos_token }}" + TEMPLATE, r"\(BOS\) twice", id="doubled BOS"),
        pytest.param("{{ messages | length }}" + TEMPLATE, "does not extend its prompt", id="prompt changes"),
        pytest.param("{{ raise_exception('only Klingon') }}", "only Klingon", id="template raises"),
        pytest.param("{% if %}", "Expected an expression", id="template does not parse"),
    ],
)
def test_chat_template_with_a_fault_is_refused_with_the_reason(folder: Path, template: str, problem: str) -> None:
    tokenizer = load_tokenizer(str(folder), None, False)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = template
    found = "; ".join(check_chat(tokenizer))
    assert re.search(problem, found)


def test_folder_without_a_chat_template_says_what_to_set(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(EngineConfigurationError, match=r"no chat template.*set base\.chat_template"):
        load_tokenizer(str(tmp_path), None, False)
    assert load_tokenizer(str(tmp_path), TEMPLATE, False).chat_template == TEMPLATE


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigurationError, match=f"{tmp_path}.*holds no tokenizer"):
        load_tokenizer(str(tmp_path), None, False)


def test_each_token_has_its_text_and_a_split_character_stands_at_its_end(tokenizer: Tokenizer) -> None:
    text = "12 apples\n \U0001f600 end"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == f"{text}<|endoftext|>" and texts[-1] == "<|endoftext|>"
    place = texts.index("\U0001f600")  # 4 bytes, no two of which the vocabulary has joined
    assert texts[place - 3 : place] == ["", "", ""]


def test_half_a_character_at_the_end_is_told_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer("a\U0001f600", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids[:-1]) == ["a", "", "", "\ufffd"]


def test_scored_text_is_a_whole_training_row_or_an_open_one(tokenizer: Tokenizer) -> None:
    prompt = render_prompt(tokenizer, QUESTION)
    assert render_scored(tokenizer, QUESTION, "7", "finished") == (prompt, render_completion(tokenizer, QUESTION, "7"))
    assert render_scored(tokenizer, QUESTION, "7", "apart") == (prompt, tokenizer("7")["input_ids"])


def test_plain_text_is_split_where_its_blanks_begin(tokenizer: Tokenizer) -> None:
    plain = ({"role": PLAIN, "content": "Ann has 12 "},)
    prompt, scored = render_scored(tokenizer, plain, "apples", "joined")
    assert (tokenizer.decode(prompt), tokenizer.decode(scored)) == ("Ann has 12", " apples")


def test_plain_text_has_one_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None, False)
    tokenizer.bos_token = "<|pad|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", bos)])
    for content in ("Ann", "<|pad|>Ann"):
        prompt, scored = render_scored(tokenizer, ({"role": PLAIN, "content": content},), " has", "joined")
        assert (prompt.count(bos), prompt[0], tokenizer.decode(scored)) == (1, bos, " has")
    assert render_scored(tokenizer, ({"role": PLAIN, "content": ""},), "Ann", "joined")[0] == [bos]
    assert bos not in render_prompt(tokenizer, QUESTION)  # a template writes its own
