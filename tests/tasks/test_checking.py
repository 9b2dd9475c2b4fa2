"""What is found wrong before anything is loaded; how the command tells each fault is in test_command."""

from pathlib import Path

import pytest

from models.specs import ModelRef
from tasks.checking import faults
from tasks.rehearsing import first_prompts
from tests.flows.builders import SMOKE, config_of, tree

VLLM = "engine={kind: vllm, max_model_len: 256}"
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def test_the_smoke_preset_has_no_fault_and_checking_it_writes_nothing(ratchet_home: Path, tmp_path: Path) -> None:
    assert faults(config_of(SMOKE)) == []
    assert tree(tmp_path) == {}


def test_faults_of_different_kinds_are_all_found() -> None:
    config = config_of(SMOKE, "base.name=microsoft/phi-2", "dev.rows.start=0", "sft.accelerate_config=none.yaml")
    told = faults(config)
    assert len(told) == 3
    assert all(any(part in fault for fault in told) for part in ("also stands in dev", "fake engine", "none.yaml"))


def test_a_few_shot_experiment_needs_completions(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    source = f"train={{path: {rows}, columns: {{answer: answer}}}}"
    assert faults(config_of(SMOKE, source)) == []
    (fault,) = faults(config_of(SMOKE, source, "few_shot={examples: 1, seed: 0}"))
    assert fault.startswith("train: rows.jsonl: row 1 has no completion")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("microsoft/phi-2", "base.revision: is missing; 'microsoft/phi-2' may be another model tomorrow"),
        ("{name: gpt2, revision: 607a30d}", None),
        ("{name: tiny, digest: ab12}", None),
        ("./models/phi", "there is no folder './models/phi'"),
        ("/models/phi", "there is no folder '/models/phi'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
    ],
)
def test_a_name_that_looks_like_a_path_must_be_a_folder(name: str, fault: str | None) -> None:
    told = faults(config_of(SMOKE, VLLM, f"base.name={name}" if name[0] != "{" else f"base={name}"))
    assert [fault in one for one in told] == [True] if fault else told == []


def test_every_sampling_must_leave_room_for_a_prompt() -> None:
    told = faults(config_of(SMOKE, "base={name: gpt2, revision: 607a30d}", "engine={kind: vllm, max_model_len: 64}"))
    assert [one.split(".max_completion_tokens")[0] for one in told] == [
        "sampling",
        "dpo.sampling",
        "evaluation.dev",
        "evaluation.test[0].sampling",
        "evaluation.test[1].sampling",
    ]


def test_the_first_prompt_is_shown_as_the_engine_gets_it() -> None:
    config = config_of(SMOKE, VLLM, "template.user=Q. $prompt")
    config = config.model_copy(update={"base": ModelRef(name="a/b", chat_template=TEMPLATE)})
    told = first_prompts(config)
    assert told["base"].text == told["trained policies"].text == "<Q. What is 58 + 24?>"


def test_the_base_is_shown_with_its_worked_examples_and_a_trained_policy_without() -> None:
    config = config_of(SMOKE, VLLM, "few_shot={examples: 2, seed: 0}")
    config = config.model_copy(update={"base": ModelRef(name="a/b", chat_template=TEMPLATE)})
    told = first_prompts(config)
    assert told["base"].text.count("FINAL ANSWER:") == 2
    assert "FINAL ANSWER:" not in told["trained policies"].text


def test_a_tiny_base_is_prompted_through_its_own_chat_template() -> None:
    config = config_of(SMOKE, VLLM, "base={corpus: {arithmetic: {kind: sums, problems: 9}}}")
    assert "What is 58 + 24?" in first_prompts(config)["base"].text
    assert first_prompts(config)["base"].text != "What is 58 + 24?"


def test_endpoints_train_adapters_only_and_only_where_they_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = "engine={{kind: openai, endpoints: ['http://10.0.0.7:8000/v1']{}}}"
    base, adapter = "base.name=gpt2", "{rank: 4, alpha: 8, merge: false}"
    (fault,) = faults(config_of(SMOKE, base, engine.format("")))
    assert "cannot serve the policies that are trained here" in fault and "engine.loads_adapters" in fault
    loading = engine.format(", loads_adapters: true")
    assert faults(config_of(SMOKE, base, loading, f"sft.lora={adapter}", f"dpo.preference.lora={adapter}")) == []
    told = faults(config_of(SMOKE, base, loading, f"sft.lora={adapter}", "dpo.preference.lora={rank: 4, alpha: 8}"))
    assert told == [
        "dpo.preference: endpoints are given adapters, not weights; set dpo.preference.lora, and "
        "dpo.preference.lora.merge: false"
    ]
    monkeypatch.setenv("RATCHET_DASK", "10.0.0.8:8786")
    assert [one.startswith("RATCHET_DASK is '10.0.0.8:8786'") for one in faults(config_of(SMOKE))] == [True]
