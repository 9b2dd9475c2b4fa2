"""Reading presets: every fault is named by key and line, and nothing is guessed."""

from pathlib import Path

import pytest

from flows.bases import TinyBase
from flows.presets import Preset, PresetError
from flows.rest_em import RestEM
from models.specs import Fake, ModelRef, TinyModel
from tests.flows.builders import SMOKE


def told_of(tmp_path: Path, *, replace: tuple[str, str] = ("", ""), overrides: tuple[str, ...] = ()) -> str:
    """The message that the smoke preset gets with one piece of its text replaced, or with overrides."""
    text = SMOKE.read_text()
    assert replace[0] in text
    preset = tmp_path / "preset.yaml"
    preset.write_text(text.replace(*replace, 1))
    with pytest.raises(PresetError) as caught:
        Preset(preset, overrides).config(RestEM)
    return str(caught.value)


def line_of(text: str) -> int:
    """The number of the first line of the smoke preset that holds this text, counted from 1."""
    return next(n for n, line in enumerate(SMOKE.read_text().splitlines(), start=1) if text in line)


def test_a_preset_becomes_its_recipes_config() -> None:
    config = Preset(SMOKE).config(RestEM)
    assert (config.experiment, config.base, config.engine) == ("rest-em-smoke", ModelRef(name="fake:0.4"), Fake())
    assert (config.iterations, config.sampling.rollouts_per_prompt) == (2, 4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("sft.learning_rate=1e-4", 1e-4, id="a number YAML reads as text"),
        pytest.param("sft.learning_rate=0.25", 0.25, id="a number"),
        pytest.param("sft.max_steps=null", None, id="null"),
        pytest.param("sft.report_to=[tensorboard]", ("tensorboard",), id="a list"),
    ],
)
def test_an_override_is_read_as_yaml(override: str, expected: object) -> None:
    config = Preset(SMOKE, [override]).config(RestEM)
    assert getattr(config.sft, override.split("=")[0].removeprefix("sft.")) == expected


def test_an_override_may_add_a_section_and_the_last_one_wins() -> None:
    config = Preset(SMOKE, ["few_shot.examples=3", "few_shot.seed=1", "few_shot.seed=2"]).config(RestEM)
    assert config.few_shot is not None
    assert (config.few_shot.examples, config.few_shot.seed) == (3, 2)


def test_one_setting_of_the_tiny_models_training_leaves_its_other_defaults() -> None:
    config = Preset(SMOKE, ["base={corpus: {arithmetic: {problems: 9}}, tiny: {training: {max_steps: 5}}}"]).config(
        RestEM
    )
    assert isinstance(config.base, TinyBase)
    training = config.base.tiny.training
    assert training.model_copy(update={"max_steps": 2000}) == TinyModel().training
    assert (training.max_steps, training.learning_rate, training.schedule) == (5, 3e-3, "trapezoid")


def test_the_text_after_the_first_equals_sign_is_the_value() -> None:
    assert Preset(SMOKE, ["marker=x = "]).config(RestEM).marker == "x ="


def test_a_misspelt_key_is_named_with_its_line_and_what_may_be_meant(tmp_path: Path) -> None:
    told = told_of(tmp_path, replace=("rollouts_per_prompt: 4, temperature: 0.8", "rollout_per_prompt: 4"))
    assert f"line {line_of('sampling: {')}: sampling.rollout_per_prompt: there is no such key" in told
    assert "did you mean 'rollouts_per_prompt'?" in told


def test_a_key_like_no_other_is_answered_with_those_there_are(tmp_path: Path) -> None:
    told = told_of(tmp_path, replace=("gate: {", "gate: {zzzzz: 1, "))
    assert "gate.zzzzz: there is no such key; there are: " in told
    assert "promote" in told


def test_a_misspelt_key_inside_a_union_is_named_without_the_name_of_its_branch(tmp_path: Path) -> None:
    told = told_of(tmp_path, replace=("engine: {kind: fake}", "engine: {kind: fake, fail_prompt: []}"))
    assert f"line {line_of('engine:')}: engine.fail_prompt: there is no such key; did you mean 'fail_prompts'?" in told


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "iterations: is missing; add it" in told_of(tmp_path, replace=("iterations: 2\n", ""))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    told = told_of(tmp_path, overrides=("iterations=0", "sampling.top_p=2", "sft.schedule=spiral"))
    assert "iterations: Input should be greater than or equal to 1; found 0" in told
    assert "sampling.top_p: Input should be less than or equal to 1; found 2" in told
    assert "sft.schedule: Input should be 'cosine'" in told
    assert "found 'spiral'" in told


def test_a_wrong_type_is_named_with_what_was_found(tmp_path: Path) -> None:
    told = told_of(tmp_path, replace=("iterations: 2", "iterations: two"))
    assert f"line {line_of('iterations: 2')}: iterations: " in told
    assert "found 'two'" in told


def test_a_rule_between_two_keys_is_told_at_the_section(tmp_path: Path) -> None:
    told = told_of(tmp_path, replace=("pass@4, maj@4", "pass@8, maj@4"))
    assert "rollouts_per_prompt is 4 but pass@8 was asked for; raise it to 8 or drop k=8" in told
    assert "evaluation.test.1" in told


def test_one_target_for_two_iterations_is_refused(tmp_path: Path) -> None:
    assert "1 target_rows for 2 iterations; give one for each" in told_of(tmp_path, overrides=("target_rows=[10]",))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        pytest.param("iterations", "--set 'iterations' is no a.b=c", id="no equals sign"),
        pytest.param("=3", "--set '=3' is no a.b=c", id="no name"),
        pytest.param("iterations.more=3", "'iterations' of 'iterations.more' is a value", id="into a value"),
        pytest.param("marker=[", "--set 'marker=[': '[' is no YAML", id="no YAML"),
        pytest.param("sft.rate=3", "sft.rate: there is no such key", id="unknown key"),
    ],
)
def test_an_override_that_cannot_be_used_is_quoted(tmp_path: Path, override: str, told: str) -> None:
    assert told in told_of(tmp_path, overrides=(override,))


def test_a_misspelt_key_of_a_tiny_base_is_compared_with_the_keys_of_that_branch(tmp_path: Path) -> None:
    base = "base: {corpus: {arithmetic: {problems: 9}}, tiny: {layer: 2}}"
    told = told_of(tmp_path, replace=('base: {name: "fake:0.4"}', base))
    assert "base.tiny.layer: there is no such key; did you mean 'layers'?" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("recipe: [rest_em\n", "is no YAML", id="syntax"),
        pytest.param("- recipe\n", "holds list; expected keys and values", id="a list"),
        pytest.param("", "holds nothing; expected keys and values", id="empty"),
        pytest.param("recipe: rest_em\nrecipe: spin\n", "line 2: the key 'recipe' stands there twice", id="twice"),
        pytest.param("a: {b: 1,\n c: 2, b: 3}\n", "line 2: the key 'b' stands there twice", id="twice in a section"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str, told: str) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(PresetError) as caught:
        Preset(preset)
    assert told in str(caught.value)
    assert str(preset) in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(b"recipe: \xff\xfe\n")
    with pytest.raises(PresetError, match=r"preset\.yaml is no YAML"):
        Preset(preset)


def test_a_preset_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"there is no preset .*deployments/presets/rest_em/smoke\.yaml"):
        Preset(tmp_path / "none.yaml")
