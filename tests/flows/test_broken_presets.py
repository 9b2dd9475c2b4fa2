"""Presets that cannot work: each fault is told with its key and its line, all at once, and nothing is written."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.__main__ import app
from tests.flows.builders import PRESETS, tree
from tests.models.tiny_fixture import save_tokenizer


class Broken(NamedTuple):
    """A smoke preset with one fault."""

    recipe: str
    replace: tuple[str, str]  # a piece of its text, and what stands there instead
    key: str  # that is told
    at: str  # stands on the line that is told, the first that holds it
    told: tuple[str, ...]


VLLM = "engine: {kind: vllm, max_model_len: 256}"
BASE = 'base: {name: "fake:0.4"}'
SMOKE_BASE = f"{BASE}\nengine: {{kind: fake}}"
TRAIN = "train:\n  arithmetic: {kind: sums, problems: 60}"

BROKEN = {
    "misspelt key": Broken(
        "rest_em", ("selection: {max_per", "selection: {max_pre"), "selection.max_pre_prompt", "selection: {",
        ("there is no such key", "did you mean 'max_per_prompt'?"),
    ),
    "misspelt section": Broken(
        "spin", ("noise:", "nosie:"), "nosie", "nosie:", ("there is no such key", "did you mean 'noise'?")
    ),
    "wrong type": Broken(
        "spin", ("iterations: 2", "iterations: two"), "iterations", "iterations:", ("valid integer", "found 'two'")
    ),
    "text for a list": Broken(
        "autoif", ('stop: ["\\n"]', 'stop: "x"'), "proposing.sampling.stop", 'stop: "x"', ("valid tuple", "found 'x'")
    ),
    "out of range": Broken(
        "autoif", ("held_out_queries: 20", "held_out_queries: 0"), "combining.held_out_queries", "combining:",
        ("greater than or equal to 1", "found 0"),
    ),
    "share above 1": Broken(
        "instruct_tuning", ("weight: 0.5", "weight: 1.5"), "conversations.sources.0.weight", "weight:",
        ("less than or equal to 1", "found 1.5"),
    ),
    "missing required key": Broken(
        "generator_evaluator", ("sampling: {rollouts", "# sampling: {rollouts"), "sampling", "", ("is missing; add it",)
    ),
    "no number": Broken(
        "rest_em", ("temperature: 0.8, max_completion_tokens: 64, prompts", "temperature: .nan, prompts"),
        "sampling.temperature", "sampling: {rollouts", ("finite number",),
    ),
    "infinite learning rate": Broken(
        "generator_evaluator", ("learning_rate: 5.0e-4", "learning_rate: .inf"), "sft.learning_rate", "sft:",
        ("finite number",),
    ),
    "negative seed": Broken(
        "rest_em", ("max_completion_tokens: 64, seed: 1000", "max_completion_tokens: 64, seed: -1"),
        "evaluation.dev.seed", "seed: -1", ("greater than or equal to 0", "found -1"),
    ),
    "name with a slash": Broken(
        "autoif", ("experiment: autoif-smoke", "experiment: auto/if"), "experiment", "experiment:", ("match pattern",)
    ),
    "unknown recipe": Broken(
        "rest_em", ("recipe: rest_em", "recipe: ppo"), "recipe", "recipe:",
        ("recipe is 'ppo'", "this version has: rest_em")
    ),
    "unknown engine": Broken(
        "spin", ("engine: {kind: fake}", "engine: {kind: sglang}"), "engine", "engine:", ("'sglang'", "'vllm'")
    ),
    "engine without a kind": Broken(
        "rest_em", ("engine: {kind: fake}", "engine: {}"), "engine", "engine:", ("discriminator 'kind'",)
    ),
    "policy at an endpoint": Broken(
        "rest_em", (SMOKE_BASE, 'base: {name: org/m}\nengine: {kind: openai, endpoints: ["http://host:1/v1"]}'),
        "engine.kind", "engine:", ("an endpoint cannot serve the policies that are trained here",),
    ),
    "endpoint that is no URL": Broken(
        "spin", ('base: {name: "fake:0.9"}', 'base: {name: m}\n  engine: {kind: openai, endpoints: ["host:8000"]}'),
        "judge.engine.endpoints", "endpoints:", ("endpoint 1 is 'host:8000', a URL was expected",),
    ),
    "endpoint with a password": Broken(
        "spin", ('base: {name: "fake:0.9"}', 'base: {name: m}\n  engine: {kind: openai, endpoints: ["http://a:b@c"]}'),
        "judge.engine.endpoints", "endpoints:", ("holds a user name or a query",),
    ),
    "pass@k over n": Broken(
        "generator_evaluator", ("pass@8", "pass@16"), "evaluation.test.1", "seed: 2000",
        ("rollouts_per_prompt is 8 but pass@16 was asked for; raise it to 16 or drop k=16",),
    ),
    "vote of an instruction follower": Broken(
        "autoif", ("[mean@1, pass@4]", "[mean@1, maj@4]"), "(the whole preset)", "",
        ("'maj@4' votes on answers, and completions have none here",),
    ),
    "greedy at a temperature": Broken(
        "instruct_tuning", ("temperature: 0.0", "temperature: 0.5"), "evaluation.test.0", "temperature: 0.5",
        ("temperature is 0.5 but greedy was asked for",),
    ),
    "many rollouts at temperature 0": Broken(
        "rest_em", ("0.8, max_completion_tokens: 64, pro", "0, max_completion_tokens: 64, pro"),
        "sampling.rollouts_per_prompt", "temperature: 0,", ("all rollouts of a prompt are the same",),
    ),
    "unknown strategy": Broken(
        "rest_em", ("[greedy]", "[best@2]"), "evaluation.test.0", "best@2", ("no strategy is called 'best@2'",)
    ),
    "unknown loss": Broken(
        "generator_evaluator", ("[sigmoid, sft]", "[sigmoid, ipo]"), "label_free.dpo.1.preference.loss_type.1",
        "ipo", ("'apo_zero'", "found 'ipo'"),
    ),
    "a weight too few": Broken(
        "generator_evaluator", ("[1.0, 1.0]", "[1.0]"), "label_free.dpo.1.preference", "loss_weights",
        ("1 loss_weights for 2 loss_type entries",),
    ),
    "negative weight": Broken(
        "generator_evaluator", ("[1.0, 1.0]", "[1.0, -1.0]"), "label_free.dpo.1.preference", "loss_weights",
        ("none may be below 0",),
    ),
    "a beta too few": Broken(
        "spin", ("betas: [0.1, 0.2]", "betas: [0.1]"), "(the whole preset)", "betas:", ("1 betas for 2 iterations",)
    ),
    "two policies of one name": Broken(
        "autoif", ("  - {beta: 0.1}", "  - {beta: 0.1}\n  - {beta: 0.1}"), "(the whole preset)", "dpo:",
        ("dpo holds entries that the report could not tell apart",),
    ),
    "adapter on the head": Broken(
        "rest_em", ("sft: {", "sft: {lora: {target_modules: [q_proj, lm_head]}, "), "sft.lora", "sft:",
        ("target_modules holds lm_head", "remove it"),
    ),
    "batch that does not come out even": Broken(
        "instruct_tuning", ("sft: {", "sft: {global_batch_size: 10, per_device_batch_size: 4, "), "sft", "sft:",
        ("per_device_batch_size is 4, which does not divide global_batch_size 10",),
    ),
    "missing accelerate file": Broken(
        "spin", ("preference: {", "preference: {accelerate_config: none.yaml, "), "preference.accelerate_config",
        "preference:", ("there is no file 'none.yaml'",),
    ),
    "empty marker": Broken(
        "generator_evaluator", ('marker: "FINAL ANSWER:"', 'marker: ""'), "marker", "marker:", ("is empty",)
    ),
    "template without the prompt": Broken(
        "rest_em", (BASE, f'{BASE}\ntemplate: {{user: "Solve it."}}'), "template", "template:", ("holds no $prompt",)
    ),
    "missing data file": Broken(
        "rest_em", (TRAIN, "train: {path: nowhere.jsonl}"), "train", "train:", ("nowhere.jsonl is not a file in",)
    ),
    "two places for one source": Broken(
        "spin", ("  rows: {start: 40}", "  rows: {start: 40}\n  path: dev.jsonl"), "dev", "path: dev.jsonl",
        ("exactly one of hub, path, arithmetic, formats",),
    ),
    "rows that leave none": Broken(
        "rest_em", ("rows: {start: 0, stop: 40}", "rows: {start: 40, stop: 40}"), "test.rows", "stop: 40",
        ("leaves none; raise stop",),
    ),
    "rows past the end": Broken(
        "rest_em", ("rows: {start: 40}", "rows: {start: 4000}"), "dev", "dev:", ("the source has no rows",)
    ),
    "more problems than there are": Broken(
        "spin", ("problems: 80, wrong_share", "problems: 9000, wrong_share"), "demonstrations", "demonstrations:",
        ("only 7,998 distinct ones were found; ask for fewer",),
    ),
    "overlapping splits": Broken(
        "generator_evaluator", ("rows: {start: 40}", "rows: {start: 39}"), "test", "test:",
        ("also stands in dev", "take other rows"),
    ),
    "unclear licence": Broken(
        "instruct_tuning", ("{arithmetic: {kind: sums, problems: 80}}", "{hub: teknium/OpenHermes-2.5}"),
        "conversations.sources.0", "OpenHermes", ("accept_unclear_licence",),
    ),
    "unknown benchmark": Broken(
        "instruct_tuning", ("gate:", "benchmarks: {tasks: [{task: imagenet}]}\ngate:"), "benchmarks.tasks.0.task",
        "benchmarks:", ("'ifeval'", "found 'imagenet'"),
    ),
    "labels of which one begins the other": Broken(
        "generator_evaluator", ("judge: {", "judge: {positive: Right, negative: Rightly not, "), "judge", "judge:",
        ("begins with the label 'Right'",),
    ),
    "judge's text without the completion": Broken(
        "generator_evaluator", ("judge: {", 'judge: {text: "Is it right? $prompt", '), "judge", "judge:",
        ("is to hold $prompt and $completion and nothing else",),
    ),
    "noise by a judge that is not there": Broken(
        "spin", ('judge:\n  base: {name: "fake:0.9"}\n  asks: {kind: labels, pairs_per_shard: 20}\n'
                 "  labelling: {swap_at: 0.3, small_below: 0.1, between: drop}\n", ""),
        "(the whole preset)", "noise:", ("there is no `judge`",),
    ),
    "more votes than rollouts": Broken(
        "generator_evaluator", ("minimum_votes: 2", "minimum_votes: 9"), "(the whole preset)", "minimum_votes: 9",
        ("minimum_votes is 9 but sampling.rollouts_per_prompt 8",),
    ),
    "fake model on vLLM": Broken(
        "rest_em", ("engine: {kind: fake}", VLLM), "base.name", "base:", ("'fake:0.4' with engine.kind 'vllm'",)
    ),
    "hub model without a revision": Broken(
        "rest_em", (SMOKE_BASE, f"base: {{name: microsoft/phi-2}}\n{VLLM}"), "base.revision", "base:",
        ("is missing", "pin a commit"),
    ),
    "no room for a prompt": Broken(
        "rest_em", (SMOKE_BASE, "base: {name: o/m, revision: abc}\nengine: {kind: vllm, max_model_len: 64}"),
        "sampling.max_completion_tokens", "sampling: {rollouts", ("is 64 but engine.max_model_len is 64",),
    ),
    "template that cannot be rendered": Broken(
        "rest_em", (SMOKE_BASE, f'base: {{name: o/m, revision: abc, chat_template: "{{% for"}}\n{VLLM}'),
        "base.chat_template", "base:", ("is no template that can be rendered",),
    ),
    "missing script": Broken(
        "autoif", ("autoif_smoke.yaml}", "autoif_smok.yaml}"), "supervisor.model.name", "autoif_smok.yaml",
        ("autoif_smok.yaml",),
    ),
    "isolation that is not there": Broken(
        "autoif", ("combining:", "limits: {memory_mib: 1}\ncombining:"), "limits", "limits:", ("memory_mib",)
    ),
}  # fmt: skip


def plan(preset: Path) -> Result:
    """Plan a preset in this process."""
    return CliRunner().invoke(app, ["plan", str(preset)])


def faults_told(done: Result) -> str:
    """What a refused preset is answered with."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def told_at(told: str, key: str, line: int | None) -> str:
    """The fault of a key, which is to stand behind this line."""
    start = key if line is None else f"line {line}: {key}"
    found = [one for one in told.splitlines() if one.strip().startswith((f"{start}:", f"{start} ", f"{start}."))]
    assert found, told
    return found[0]


@pytest.fixture(autouse=True)
def in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset names files of the repository, which lies beside it here."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "deployments").symlink_to(PRESETS.parent)
    monkeypatch.chdir(work)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_preset_is_refused_with_key_and_line_before_anything_is_written(name: str, tmp_path: Path) -> None:
    broken = BROKEN[name]
    text = (PRESETS / broken.recipe / "smoke.yaml").read_text()
    assert broken.replace[0] in text
    preset = tmp_path / "preset.yaml"
    preset.write_text(text := text.replace(*broken.replace, 1))
    before = tree(tmp_path)
    told = faults_told(plan(preset))
    numbers = [n for n, line in enumerate(text.splitlines(), start=1) if broken.at and broken.at in line]
    fault = told_at(told, broken.key, numbers[0] if numbers else None)
    assert [part for part in broken.told if part not in fault] == [], fault
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"recipe: rest_em\n\texperiment: x\n", ("is no YAML", "line 2", "'\\t'"), id="tab"),
        pytest.param(b"recipe: [rest_em\n", ("is no YAML", "line"), id="bracket"),
        pytest.param(b"recipe: rest_em\nrecipe: spin\n", ("line 2: the key 'recipe' stands there twice",), id="twice"),
        pytest.param(
            b"sft: {seed: 1,\n  seed: 2}\n", ("line 2: the key 'seed' stands there twice",), id="twice inside"
        ),
        pytest.param(b"recipe: \xff\xfe\n", ("is no YAML",), id="not UTF-8"),
        pytest.param(b"", ("holds nothing", "expected keys and values"), id="empty"),
        pytest.param(b"# only a remark\n", ("holds nothing", "expected keys and values"), id="comments"),
        pytest.param(b"- recipe\n- rest_em\n", ("holds list", "expected keys and values"), id="list"),
        pytest.param(b"rest_em\n", ("holds str", "expected keys and values"), id="word"),
        pytest.param(b"recipe: rest_em\n", ("experiment: is missing", "evaluation: is missing"), id="recipe alone"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(content: bytes, told: tuple[str, ...], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(content)
    found = faults_told(plan(preset))
    assert [part for part in told if part not in found] == [], found


def smoke_with(tmp_path: Path, *replacements: tuple[str, str], recipe: str = "rest_em") -> tuple[Path, str]:
    """A smoke preset with pieces of its text replaced, and its text."""
    text = (PRESETS / recipe / "smoke.yaml").read_text()
    for replacement in replacements:
        assert replacement[0] in text
        text = text.replace(*replacement, 1)
    (tmp_path / "preset.yaml").write_text(text)
    return tmp_path / "preset.yaml", text


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        pytest.param([("1 + 1?", "2"), ("1 + 2?", "three or so")], "the gold answer of row 2 is", id="unreadable"),
        pytest.param([("1 + 1?", "2"), ("1 + 3?", "4"), ("1 + 1?", "2")], "rows 1 and 3 hold the same", id="twice"),
        pytest.param([("1 + 1?", 2)], "column 'answer' is 2, expected text", id="number"),
        pytest.param([("", "2")], "column 'prompt' is empty", id="empty prompt"),
        pytest.param([], "the source has no rows", id="no rows"),
    ],
)
def test_rows_at_fault_are_told_at_the_line_of_their_source(
    rows: list[tuple[str, object]], told: str, tmp_path: Path
) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    preset, text = smoke_with(tmp_path, (TRAIN, "train: {path: rows.jsonl, columns: {answer: answer}}"))
    line = text.splitlines().index("train: {path: rows.jsonl, columns: {answer: answer}}") + 1
    assert told in told_at(faults_told(plan(preset)), "train", line)


def test_an_unknown_column_is_answered_with_those_there_are(tmp_path: Path) -> None:
    Path("rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    preset, _ = smoke_with(tmp_path, (TRAIN, "train: {path: rows.jsonl, columns: {answer: answer}}"))
    assert "expected a column 'prompt', found ['answer', 'question']" in faults_told(plan(preset))


def model_folder(chat_template: str | None) -> None:
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "phi"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    save_tokenizer(folder, chat_template=chat_template)


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MODEL = f"base: {{name: ./model}}\n{VLLM}"


def test_a_tokenizer_without_a_chat_template_is_told(tmp_path: Path) -> None:
    model_folder(None)
    preset, text = smoke_with(tmp_path, (SMOKE_BASE, MODEL))
    line = text.splitlines().index("base: {name: ./model}") + 1
    assert "has no chat template" in told_at(faults_told(plan(preset)), "base", line)


def test_a_template_that_never_ends_the_turn_is_told(tmp_path: Path) -> None:
    model_folder("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    preset, _ = smoke_with(tmp_path, (SMOKE_BASE, MODEL))
    assert "would never learn to stop" in faults_told(plan(preset))


def test_a_prompt_and_completion_longer_than_the_model_takes_are_told(tmp_path: Path) -> None:
    model_folder(TEMPLATE)
    preset, text = smoke_with(tmp_path, (SMOKE_BASE, MODEL.replace("256", "66")))
    line = next(n for n, one in enumerate(text.splitlines(), start=1) if one.startswith("sampling: {"))
    fault = told_at(faults_told(plan(preset)), "sampling.max_completion_tokens", line)
    assert re.search(r"is 64, and the first prompt takes \d+ tokens, but engine.max_model_len is 66", fault)


def test_labels_of_several_tokens_are_told_where_single_ones_are_asked_for(tmp_path: Path) -> None:
    model_folder(TEMPLATE)
    preset, text = smoke_with(
        tmp_path, (SMOKE_BASE, MODEL), ("judge: {", "judge: {label_tokens: one, "), recipe="generator_evaluator"
    )
    line = next(n for n, one in enumerate(text.splitlines(), start=1) if one.startswith("judge: {"))
    assert "('Incorrect')" in told_at(faults_told(plan(preset)), "judge.label_tokens", line)


def test_faults_of_every_kind_are_told_at_once(tmp_path: Path) -> None:
    preset, _ = smoke_with(
        tmp_path,
        ("selection: {max_per", "selection: {max_pre"),  # no such key
        ("iterations: 2", "iterations: two"),  # a required key of the wrong type
        ("pass@4", "pass@9"),  # a rule between two keys
        (TRAIN, "train: {path: nowhere.jsonl}"),  # a file that is not there
        ("rows: {start: 40}", "rows: {start: 4000}"),  # rows that are not there
    )
    told = faults_told(plan(preset))
    expected = ("max_pre_prompt: there is", "found 'two'", "pass@9", "nowhere.jsonl is not", "dev: the source has no")
    assert [part for part in expected if part not in told] == [], told
    assert all(line.startswith("  line ") for line in told.splitlines()[1:]), told


def test_a_rule_between_keys_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    preset, text = smoke_with(
        tmp_path,
        ("betas: [0.1, 0.2]", "betas: [0.1]"),
        ("rows: {start: 0, stop: 40}", "rows: {start: 0, stop: 41}"),
        recipe="spin",
    )
    told = faults_told(plan(preset))
    assert f"line {text.splitlines().index('betas: [0.1]') + 1}: (the whole preset): 1 betas for 2 iterations" in told
    assert "also stands in dev" in told


def test_what_stands_in_for_a_wrong_value_makes_no_faults_of_its_own(tmp_path: Path) -> None:
    # without the wrong max_completion_tokens its default, 384, would be too long for the model
    preset, _ = smoke_with(
        tmp_path,
        (SMOKE_BASE, f"base: {{name: o/m, revision: abc}}\n{VLLM}"),
        ("max_completion_tokens: 64, prompts_per_shard: 10", "max_completion_tokens: many"),
    )
    assert len(faults_told(plan(preset)).splitlines()) == 2
