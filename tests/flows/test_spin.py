"""The SPIN recipe, end to end on the fake engine."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from flows.presets import Preset
from flows.spin import Spin, spin
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.home import home
from storage.rows import Pair, PairFigure, Rollout
from tasks.playing import NothingToLearn
from tasks.tables import published_rows
from tests.benchmark_documents import write_documents
from tests.flows.builders import PRESETS, heard, stored

FOLDER = PRESETS / "spin"
SMOKE = FOLDER / "smoke.yaml"
PLAIN = ("judge=null", "noise={}")


def config_of(preset: Path, *overrides: str) -> Spin:
    return Preset(preset, overrides).config(Spin)


def run_plainly(*overrides: str) -> Experiment:
    """Run the smoke preset without Prefect."""
    config = config_of(SMOKE, *overrides)
    spin.fn(config)
    return Experiment(config.experiment)


def done(step: str) -> list[dict[str, Any]]:
    """What is stored of a step: key parts and value of each of its results."""
    return [json.loads(file.read_text()) for file in sorted((home() / "steps" / step).glob("*.json"))]


def digest_of(policy: dict[str, Any]) -> str | None:
    digest: str | None = policy["digest"]
    return digest


@pytest.mark.parametrize("preset", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    assert config_of(preset).recipe == "spin"


@pytest.mark.flow
def test_each_iteration_is_played_against_and_trained_from_the_policy_before_it() -> None:
    records = run_plainly(*PLAIN, "iterations=3", "betas=null").iterations()
    trained = {result["value"]["digest"]: result["key_parts"]["inputs"] for result in done("train_preferences")}
    assert len(trained) == 3
    for before, after in pairwise(records):
        policy = before.policy["digest"] or f"{before.policy['name']}@unpinned"
        rollouts = read_rows(DatasetRef(**after.references["rollouts"]), Rollout)
        assert {row.policy for row in rollouts} == {policy}
        start = trained[after.policy["digest"]]["start"]  # whose weights are also the reference's
        assert start["digest"] == before.policy["digest"] if before.policy["digest"] else start["name"] == "fake:0.4"


@pytest.mark.flow
@pytest.mark.parametrize(("mix_last", "expected"), [(1, [1, 1, 1]), (2, [1, 2, 2]), (3, [1, 2, 3])])
def test_pairs_of_the_last_iterations_are_mixed(mix_last: int, expected: list[int]) -> None:
    records = run_plainly(*PLAIN, "iterations=3", "betas=null", f"mix_last={mix_last}").iterations()[1:]
    inputs = {result["value"]["digest"]: result["key_parts"]["inputs"]["pairs"] for result in done("train_preferences")}
    mixed = [inputs[record.policy["digest"]] for record in records]
    assert [len(pairs) for pairs in mixed] == expected
    assert [pairs[-1]["rows"] for pairs in mixed] == [record.references["pairs"]["digest"] for record in records]


@pytest.mark.flow
def test_the_demonstration_is_chosen_and_nothing_is_swapped_without_a_judge() -> None:
    experiment = run_plainly(*PLAIN)
    for record in experiment.iterations()[1:]:
        assert record.label.startswith("SPIN-iter")
        rows = list(read_rows(DatasetRef(**record.references["pairs"]), Pair))
        assert {(row.rule, row.swapped, row.margin, row.chosen_index) for row in rows} == {("gold", False, None, None)}
        assert record.funnel["pairs"] == len(rows)
        assert sum(record.drops.values()) + len(rows) == record.funnel["sampled"]
        figures = read_rows(DatasetRef(**record.references["pair_figures"]), PairFigure)
        assert {row.about for row in figures} == {"chosen", "rejected"}


@pytest.mark.flow
def test_a_judge_swaps_and_drops_and_every_bucket_is_told() -> None:
    experiment = run_plainly()
    first = experiment.iterations()[1]
    assert first.label == "judged noised SPIN-iter0"
    rows = list(read_rows(DatasetRef(**first.references["pairs"]), Pair))
    figures = {
        (row.about, row.name): row for row in read_rows(DatasetRef(**first.references["pair_figures"]), PairFigure)
    }
    buckets = ("own better", "between", "small margin", "gold better")
    told = {name: figures["judged", name] for name in buckets}
    assert sum(figure.value for figure in told.values()) == told["between"].n
    assert first.drops["judged: between"] == told["between"].value
    assert sum(row.swapped for row in rows) == told["own better"].value == first.funnel["swapped"] > 0
    assert figures["pairs", "noised"].value == told["small margin"].value > 0
    html = Path(CliRunner().invoke(app, ["report", experiment.name]).stdout.strip()).read_text()
    assert "The pairs" in html
    assert "noised" in html


@pytest.mark.flow
def test_a_demonstration_longer_than_the_cap_of_rollouts_is_left_out_and_counted() -> None:
    # "1 + 2 = 3\nFINAL ANSWER: 3" are eight words, as the fake engine counts them.
    config = config_of(SMOKE, *PLAIN, "sampling.max_completion_tokens=7")
    with heard() as steps, pytest.raises(NothingToLearn, match=r"made no pair of 40 .*over max_completion_tokens 40"):
        spin.fn(config)
    assert steps[-1].step == "pair_with_gold"


@pytest.mark.flow
def test_a_judge_that_has_all_pairs_dropped_is_told() -> None:
    with pytest.raises(NothingToLearn, match=r"dropped all \d+ pairs \(judged: small margin \d+"):
        run_plainly("judge.labelling={small_below: 1.0, swap_at: 1.0, small: drop}")


@pytest.mark.flow
def test_a_second_run_is_all_cache_and_another_threshold_needs_no_new_judging() -> None:
    first = stored(run_plainly())
    with heard() as steps:
        assert stored(run_plainly()) == first
    assert [step.step for step in steps if not step.cached] == []
    with heard() as steps:
        run_plainly("judge.labelling.between=keep")
    redone = {step.step for step in steps if not step.cached and step.iteration == 1 and step.split is None}
    told = {"describe_pairs", "count_overlaps", "decide_promotion", "look_for_regression"}
    assert redone == {"relabel_pairs", "train_preferences", *told}


@pytest.mark.flow
def test_iterations_have_their_own_beta_and_learning_rate() -> None:
    run_plainly(*PLAIN, "betas=[0.1, 5.0]", "learning_rates=[5e-7, 1e-7]")
    used = {
        (inputs["preference"]["beta"], inputs["preference"]["learning_rate"])
        for inputs in (result["key_parts"]["inputs"] for result in done("train_preferences"))
    }
    assert used == {(0.1, 5e-7), (5.0, 1e-7)}


def test_each_noise_reaches_the_settings_it_is_meant_for() -> None:
    embedding = config_of(SMOKE, "judge=null", "noise={embedding: {alpha: 5}}").preference_of(1)
    assert (embedding.embedding_noise, embedding.reference_noise) == (5, None)
    hotter = config_of(SMOKE, "judge=null", "noise={temperature: 1.3}")
    assert (hotter.sampling_of(2).temperature, hotter.sampling_of(2).seed) == (1.3, 2)
    everywhere = config_of(SMOKE, "judge=null", "noise={reference: {noise: {scale: 0.5, learned: {}}}}").preference_of(
        1
    )
    assert everywhere.reference_noise is not None
    assert everywhere.reference_noise.below_margin is None
    assert everywhere.reference_noise.learned is not None
    adaptive = config_of(SMOKE).preference_of(2)
    assert adaptive.reference_noise is not None
    assert (adaptive.reference_noise.below_margin, adaptive.beta) == (0.1, 0.2)
    plain = config_of(SMOKE, *PLAIN).preference_of(1)
    assert (plain.embedding_noise, plain.reference_noise, plain.label_smoothing) == (None, None, 0.0)


@pytest.mark.flow
def test_the_robust_loss_gets_the_judges_flip_rate() -> None:
    robust = ("judge.labelling={swap_at: null, between: keep}", "noise={robust: {}}", "iterations=1", "betas=null")
    record = run_plainly(*robust).iterations()[1]
    (trained,) = done("train_preferences")
    used = trained["key_parts"]["inputs"]["preference"]
    rows = list(read_rows(DatasetRef(**record.references["pairs"]), Pair))
    decided = [row.margin for row in rows if row.margin is not None and abs(row.margin) >= 0.1]
    assert used["loss_type"] == ["robust"]
    assert used["label_smoothing"] == pytest.approx(min(0.45, sum(margin < 0 for margin in decided) / len(decided)))


@pytest.mark.flow
def test_the_control_imitates_the_same_chosen_sides() -> None:
    records = run_plainly(*PLAIN, "sft={learning_rate: 1e-5}").iterations()
    assert [record.label for record in records[1:]] == ["SFT-iter0", "SFT-iter1"]
    assert records[1].funnel["trained_on"] == records[1].funnel["pairs"]
    assert records[2].funnel["trained_on"] == records[1].funnel["pairs"] + records[2].funnel["pairs"]


def chats(root: Path, count: int) -> None:
    """UltraChat in its own format and folder, of our own sums."""
    folder = root / "HuggingFaceH4" / "ultrachat_200k"
    folder.mkdir(parents=True)
    with (folder / "train_sft.jsonl").open("w") as lines:
        for n in range(count):
            told = f"{n} + 2 = {n + 2}\nFINAL ANSWER: {n + 2}"
            turns = [("user", f"What is {n} + 2?"), ("assistant", told), ("user", "And then?"), ("assistant", "Then?")]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"prompt": turns[0][1], "prompt_id": str(n), "messages": messages}) + "\n")


@pytest.mark.flow
@pytest.mark.parametrize("name", ["zephyr_ultrachat", "llama2_ultrachat"])
def test_the_seeds_presets_can_be_planned_without_a_model(
    name: str, tmp_path: Path, ratchet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats(tmp_path, 10)
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the benchmarks' documents would be asked for
    monkeypatch.chdir(PRESETS.parents[1])
    ran = CliRunner().invoke(app, ["plan", str(FOLDER / f"{name}.yaml"), "--json"])
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.stdout)
    told = [step["step"] for step in plan["steps"]]
    assert told.count("train_preferences") == 4
    assert told.count("answer_benchmark") == 5 * (7 + 57)  # the base and four policies; MMLU has 57 tasks
    assert ("train_sft" in told) is (name == "llama2_ultrachat")
    assert "And then?" not in json.dumps(plan["first_prompts"])  # the first turn only
    shots = {one["task"]: one["shots"] for one in plan["config"]["benchmarks"]["tasks"]}
    assert [shots[task] for task in ("arc_challenge", "arc_easy", "winogrande", "gsm8k", "hellaswag", "mmlu")] == [
        25,
        25,
        5,
        5,
        10,
        5,
    ]
    assert not ratchet_home.exists()


@pytest.mark.flow
def test_a_policy_can_be_measured_on_benchmarks_alone_beside_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path)
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    config = config_of(
        SMOKE,
        *PLAIN,
        *("dev=null", "test=null", "evaluation=null", "gate={promote: always, strategy: average of tasks}"),
        "benchmarks={tasks: [{task: arc_challenge, shots: 2, limit: 4}, {task: gsm8k, shots: 1, limit: 4}]}",
        "published={SPIN-iter0: {arc_challenge (2): 59.22, mmlu (5): 59.01}, SPIN-iter3: {gsm8k (1): 27.52}}",
        "iterations=1",
        "betas=null",
    )
    spin.fn(config)
    experiment = Experiment(config.experiment)
    base, first = experiment.iterations()
    assert set(first.metrics) == {"arc_challenge (2)", "gsm8k (1)", "average of tasks"} == set(base.metrics)
    one, other = (first.metrics[name]["value"] for name in ("arc_challenge (2)", "gsm8k (1)"))
    assert first.metrics["average of tasks"]["value"] == pytest.approx((one + other) / 2)
    assert first.metrics["arc_challenge (2)"]["n"] == 4
    rows = {(row.label, row.strategy): row for row in published_rows(experiment.config(), experiment.iterations())}
    assert rows["SPIN-iter0", "arc_challenge (2)"].ours is not None
    assert rows["SPIN-iter0", "mmlu (5)"].ours is None  # "not run"
    assert rows["SPIN-iter3", "gsm8k (1)"].ours is None


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "small margins without a judge": (["judge=null"], ("go by a judge's margins, and there is no `judge`",)),
    "robust without a judge": (["judge=null", "noise={robust: {}}"], ("there is no `judge`",)),
    "no dev and no benchmarks": (["dev=null"], ("dev missing", "on benchmarks alone")),
    "betas of other length": (["betas=[0.1]"], ("1 betas for 2 iterations",)),
    "an adapter that is never merged": (["preference.lora={merge: false}"], ("set it to true",)),
    "noise in the wrong place": (["preference.embedding_noise=5"], ("noise is set under `noise`",)),
    "an unknown way to ask": (["judge.asks.kind=guess"], ("judge.asks", "'guess'")),
    "a misspelt key of a judge": (["judge.asks.judg={}"], ("judge.asks.judg: there is no such key",)),
    "swapping small margins": (["judge.labelling.small_below=0.4"], ("a small margin would be swapped",)),
    "robust with another loss": (
        ["noise={robust: {}}", "preference.loss_type=[hinge]"],
        ("takes the place of the sigmoid loss",),
    ),
    "a tiny judge asked what it was not taught": (
        ["judge={base: {corpus: {arithmetic: {problems: 9}}}}"],
        ("this one is for asks.kind 'likelihood', and it is 'labels'",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_configuration_is_told_and_nothing_is_written(name: str, ratchet_home: Path) -> None:
    overrides, told = BAD[name]
    ran = CliRunner().invoke(app, ["run", str(SMOKE), *(part for one in overrides for part in ("--set", one))])
    assert ran.exit_code == 2, ran.output
    for part in told:
        assert part in ran.stderr
    assert not ratchet_home.exists()
