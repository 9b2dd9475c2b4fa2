"""kill -9 with the real parts: vLLM in the middle of sampling, TRL in the middle of training."""

import re
from collections import Counter
from pathlib import Path

import pytest

from storage.datasets import DatasetRef, what_is_wrong
from storage.experiments import Experiment
from tests.faults.harness import PLAIN, Place, in_ledger, leftovers, processes, run_alone, started
from tests.faults.test_two_runs import until

REAL = Path(__file__).with_name("real.yaml")
TRAINING_ROLLOUTS = 24 * 8


def checkpoints(place: Place) -> list[int]:
    found = place.home.glob("models/.scratch-*/checkpoints/checkpoint-*/whole.json")
    return sorted(int(file.parent.name.split("-")[1]) for file in found)


def training_rows(place: Place) -> Counter[tuple[str, int]]:
    return Counter({row[3:]: count for row, count in in_ledger(place.home).items() if row[2] == 1})


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_a_run_killed_while_vllm_samples_and_again_while_trl_trains_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, temporary = Place(tmp_path / "place"), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))  # the runs inherit it
    with started(place, REAL, PLAIN) as first:
        until(lambda: first.poll() is not None or training_rows(place), "the first training rollouts", patience=120)
        first.kill()
        first.wait()
    kept = set(training_rows(place))
    assert 0 < len(kept) < TRAINING_ROLLOUTS
    assert processes(place, patience=25) == []
    with started(place, REAL, PLAIN, RATCHET_LOG="INFO") as second:
        until(lambda: second.poll() is not None or checkpoints(place)[-1:] > [20], "a second checkpoint", patience=120)
        second.kill()
        second.wait()
    rows = training_rows(place)
    assert len(rows) == TRAINING_ROLLOUTS
    assert set(rows.values()) == {1}  # what was safe after the first kill was not drawn again
    resumable = checkpoints(place)[-1]
    assert 20 < resumable < 80
    assert processes(place, patience=25) == []
    third = run_alone(place, REAL, PLAIN, deadline=150, RATCHET_LOG="INFO")
    assert third.status == 0, third.output
    steps = [int(step) for step in re.findall(r"optimizer step (\d+) of 80", third.output)]
    assert steps
    assert min(steps) > resumable - 10  # the newest checkpoint may be torn; then it is the one before
    assert leftovers(place) == []
    assert processes(place, patience=25) == []
    assert not list(temporary.glob("ratchet-*"))
    monkeypatch.setenv("RATCHET_HOME", str(place.home))
    references = [ref for record in Experiment("real").iterations() for ref in record.references.values()]
    assert references
    assert [what_is_wrong(DatasetRef(**ref), deep=True) for ref in references] == [None] * len(references)
