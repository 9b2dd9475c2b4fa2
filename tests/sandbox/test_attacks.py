"""Each hostile verifier is held: its outcome, what it would have left behind, and the sandbox right after it."""

import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.sandbox_pool import ATTEMPTS, Pool, Setup
from tests.sandbox.attacks import ATTACKS, Attack
from tests.sandbox.running import MARK, TOLD, processes

# Each weaker level as well, with the proofs that take long.
LEVELS = [
    pytest.param(layers, marks=pytest.mark.slow if place else pytest.mark.flow) for place, layers in enumerate(ATTEMPTS)
]
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


@pytest.fixture(scope="module", params=LEVELS, ids="+".join)
def pool(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(Setup(), [request.param])
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


# What is denied by number as well as by the functions above: x86_64's.
DENIED = """
    fork 57  vfork 58  clone 56  clone3 435  execve 59  execveat 322  kill 62  tkill 200  tgkill 234  ptrace 101
    process_vm_readv 310  process_vm_writev 311  pidfd_open 434  pidfd_getfd 438  pidfd_send_signal 424  open 2
    openat 257  openat2 437  creat 85  open_by_handle_at 304  memfd_create 319  socket 41  socketpair 53
    connect 42  sendto 44  bind 49  io_uring_setup 425  bpf 321  perf_event_open 298  userfaultfd 323
    unshare 272  setns 308  mount 165  umount2 166  pivot_root 155  chroot 161  chdir 80  unlink 87  rename 82
    mkdir 83  chmod 90  truncate 76  ftruncate 77  link 86  setuid 105  setresuid 117  setsid 112  setpgid 109
    capset 126  keyctl 250  add_key 248  shmget 29  msgget 68  semget 64  mq_open 240  personality 135
    seccomp 317  init_module 175  kexec_load 246  reboot 169  iopl 172  modify_ldt 154  pipe 22  pipe2 293
    eventfd2 290  timerfd_create 283  epoll_create1 291  inotify_init1 294  fanotify_init 300  splice 275
    sendfile 40  setpriority 141  sched_setaffinity 203  sched_setscheduler 144  recvmsg 47  an_unknown_one 999
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86_64's")
def test_each_denied_system_call_ends_the_process(pool: Pool) -> None:
    source = "import ctypes\ndef evaluate(response):\n    ctypes.CDLL(None).syscall(int(response), 0, 0, 0, 0, 0, 0)\n"
    names, numbers = DENIED.split()[::2], DENIED.split()[1::2]
    found = [row[0][0] for row in pool.run([(source, (number,)) for number in numbers], TOLD)]
    assert dict(zip(names, found, strict=True)) == dict.fromkeys(names, "forbidden")
