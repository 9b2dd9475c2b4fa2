"""Each hostile verifier is held: its outcome, what it would have left behind, and the sandbox right after it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.sandbox_pool import Pool, Setup
from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.running import MARK, TOLD, processes

pytestmark = pytest.mark.flow

SECRET = "hunter2-of-this-machine"
PROBE = ("def evaluate(response):\n    return response.count('a') == 2\n", ("banana", "papaya", "salad", ""))
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


@pytest.mark.parametrize("attack", [pytest.param(one, id=one.name.replace(" ", "-")) for one in ATTACKS])
def test_an_attack_costs_its_own_rows_only(attack: Attack, machine: Machine, pool: Pool) -> None:
    before, parent = processes(), os.getppid()
    replaced = pool.replaced
    ahead, attacked, behind = pool.run([PROBE, (machine.aim(attack.source), RESPONSES), PROBE], TOLD)
    found = tuple(outcome for outcome, _ in attacked)
    assert found in attack.outcomes, attacked
    assert [outcome for outcome, _ in ahead] == PROBED
    assert [outcome for outcome, _ in behind] == PROBED
    assert [outcome for outcome, _ in pool.run([PROBE], TOLD)[0]] == PROBED
    assert not any(SECRET in detail or len(detail) > 160 for _, detail in attacked)
    assert pool.replaced == replaced  # not even the worker was lost
    assert processes() == before
    assert os.getppid() == parent
    machine.check_untouched()
