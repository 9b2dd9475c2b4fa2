"""Each hostile verifier is held: its outcome, what it would have left behind, and the sandbox right after it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks import sandbox_pool
from tasks.sandbox import Job, Limits, Verdict
from tasks.sandbox_pool import Pool, Setup
from tests.sandbox.attacks import ATTACKS, Attack

pytestmark = pytest.mark.flow

SECRET = "hunter2-of-this-machine"
MARK = 98_761  # an argument that only a command started by an attack has
LIMITS = Limits(cpu_seconds=0.2, wall_seconds=1.0, verifier_seconds=5.0, memory_mb=64)
PROBE = Job("def evaluate(response):\n    return response.count('a') == 2\n", ("banana", "papaya", "salad", ""))
PROBED = ["failed", "failed", "passed", "failed"]  # 3, 3, 2 and 0 times the letter a
RESPONSES = ("one", "two")


class Machine:
    """What an attack aims at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file, self.new = folder / "secret.txt", folder / "new"
        self.file.write_text(f"secret: {SECRET}")
        (folder / "planted.py").write_text(f"raise ValueError({SECRET!r})")
        self.tcp, self.udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        self.unix = socket.socket(socket.AF_UNIX)
        self.tcp.bind(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.unix.bind(str(folder / "unix"))
        for listener in (self.tcp, self.unix):
            listener.listen()
        for listener in (self.tcp, self.udp, self.unix):
            listener.setblocking(False)
        self.files = self._files()

    def aim(self, source: str) -> str:
        """The source of an attack, with this machine's names in it."""
        names = {"FILE": self.file, "NEW": self.new, "FOLDER": self.folder, "UNIX": self.folder / "unix"}
        for name, value in {**names, "PORT": self.port, "MARK": MARK}.items():
            source = source.replace(f"@{name}@", str(value))
        return source

    def check_untouched(self) -> None:
        """Nothing written, removed or connected to."""
        assert self._files() == self.files
        for listener in (self.tcp, self.unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(9)

    def close(self) -> None:
        for listener in (self.tcp, self.udp, self.unix):
            listener.close()

    def _files(self) -> dict[str, tuple[int, str]]:
        plain = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mode, path.read_text()) for path in plain}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("aimed-at")
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_TEST_SECRET", SECRET)
        machine = Machine(folder)
        yield machine
        machine.close()


@pytest.fixture(scope="module")
def pool(machine: Machine) -> Iterator[Pool]:
    pool = Pool(Setup())
    yield pool
    pool.close()


def processes() -> set[int]:
    """The processes of this checkout's sandboxes, and commands that an attack started."""
    program = str(sandbox_pool.PROGRAM)
    listed = ((one.pid, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    return {pid for pid, command in listed if program in command or str(MARK) in command}


def ask(pool: Pool, *jobs: Job, share: int = 25) -> list[list[Verdict]]:
    """Verdicts of one batch."""
    names = ("cpu_seconds", "wall_seconds", "verifier_seconds", "memory_mb", "detail_length")
    told = {"share": share, **{name: getattr(LIMITS, name) for name in names}}
    return [[Verdict(outcome, detail, pool.level) for outcome, detail in row] for row in pool.run(jobs, told)]  # type: ignore[arg-type]


@pytest.mark.parametrize("attack", [pytest.param(one, id=one.name.replace(" ", "-")) for one in ATTACKS])
def test_an_attack_costs_its_own_rows_only(attack: Attack, machine: Machine, pool: Pool) -> None:
    before, parent = processes(), os.getppid()
    replaced = pool.replaced
    ahead, attacked, behind = ask(pool, PROBE, Job(machine.aim(attack.source), RESPONSES), PROBE)
    found = tuple(verdict.outcome for verdict in attacked)
    assert found in attack.outcomes, attacked
    assert [verdict.outcome for verdict in ahead] == PROBED
    assert [verdict.outcome for verdict in behind] == PROBED
    assert [verdict.outcome for verdict in ask(pool, PROBE)[0]] == PROBED
    assert not any(SECRET in verdict.detail for verdict in attacked)
    assert all(len(verdict.detail) <= LIMITS.detail_length for verdict in attacked)
    assert pool.replaced == replaced  # not even the worker was lost
    assert processes() == before
    assert os.getppid() == parent
    machine.check_untouched()
