"""The sandbox's child program, started by tasks/sandbox_pool.py, talking over its standard streams.

Standard library only. It walls itself in, loads what verifiers may import, and has tasks/sandbox_watch.py fork a child
for each verifier, or for several plain ones. It holds no secret, not even
which verdicts are hoped for.
"""

import errno
import gc
import importlib
import importlib.machinery
import json
import linecache
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from tasks import sandbox_layers as layers
from tasks.sandbox_calls import Task
from tasks.sandbox_watch import Batch, Walls

ASK, TELL = 10, 11  # where standard input and output are moved, out of a child's reach
# What verifiers import; each megabyte more makes every fork slower. What is not here and not asked for is missing.
PRELOAD = """
    __future__ _strptime abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib
    copy csv ctypes dataclasses datetime decimal difflib enum fnmatch fractions functools hashlib heapq hmac html
    html.parser graphlib inspect io itertools json keyword locale logging math mmap numbers operator os pathlib
    pickle pprint queue random re reprlib secrets select shlex shutil signal socket statistics string stringprep
    struct subprocess tempfile textwrap threading time tokenize traceback types typing unicodedata urllib.parse uuid
    warnings weakref xml.etree.ElementTree zlib encodings.idna encodings.utf_16 encodings.utf_32 encodings.latin_1
    encodings.ascii encodings.cp1252 encodings.punycode encodings.unicode_escape encodings.rot_13
    encodings.hex_codec encodings.utf_8_sig
"""


def main() -> None:
    """Set up, say what walls stand, then answer one batch after the other until the input ends."""
    os.dup2(0, ASK)
    os.dup2(1, TELL)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    ask, tell = os.fdopen(ASK, "rb"), os.fdopen(TELL, "wb")
    try:
        zygote = Zygote(_receive(ask) or {})
    except Exception as error:  # whatever it is, the host must hear of it
        _send(tell, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(tell, {"layers": zygote.layers, "missing": zygote.missing})
    os.dup2(null, 2)
    while (batch := _receive(ask)) is not None:
        tasks = [Task(*task) for task in batch["tasks"]]
        _send(tell, Batch(zygote.walls(), tasks, batch["limits"]).run())


class Zygote:
    """This process, walled in.

    Args:
        wanted: `layers`: the walls to put up; `preload`: more modules; `path`: where these are found.
    """

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.layers: list[str] = []
        self.missing: dict[str, str] = {}
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if os.path.exists("/proc/self/statm") else None  # noqa: PTH110
        wanted_layers = wanted["layers"]
        if "namespaces" in wanted_layers and self._put_up("namespaces", layers.unshare):
            _become_first_process()
        _preload(wanted["preload"], wanted["path"])
        if "namespaces" in self.layers and not self._put_up("namespaces", layers.empty_root):
            self.layers.remove("namespaces")
        try:
            layers.adopt_orphans()
            layers.drop_privileges()  # which also forgets whom to die with
            if os.getpid() == 1:
                layers.die_with_parent()
        except (OSError, AttributeError):  # no Linux, or one that denies even this
            if wanted_layers:
                raise
        if "landlock" in wanted_layers:
            self._put_up("landlock", layers.restrict_files)
        self.filter: layers.Filter | None = None
        if "seccomp" in wanted_layers and self._put_up("seccomp", _try_filter):
            self.filter = layers.Filter()
        layers.lower_limit(resource.RLIMIT_CORE, 0)
        layers.lower_limit(resource.RLIMIT_FSIZE, 0)
        gc.collect()
        gc.disable()
        gc.freeze()

    def walls(self) -> Walls:
        """What each child is put behind."""
        return Walls(self.filter, os.getpid() == 1 and "namespaces" in self.layers, ASK, self.memory)

    def memory(self) -> int | None:
        """Bytes of address space, or None where the kernel does not say."""
        if self._statm is None:
            return None
        return int(os.pread(self._statm, 64, 0).split()[0]) * resource.getpagesize()

    def _put_up(self, layer: str, build: Callable[[], None]) -> bool:
        try:
            build()
        except OSError as error:
            self.missing[layer] = error.strerror or str(error)
            return False
        if layer not in self.layers:
            self.layers.append(layer)
        return True


def _become_first_process() -> None:
    """Go on as process 1 of the new namespace; the process the host knows waits, and takes it along when it ends."""
    pid = os.fork()
    if pid:
        os.closerange(3, 64)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    layers.die_with_parent()


def _preload(more: list[str], path: list[str]) -> None:
    for name in PRELOAD.split():
        try:
            importlib.import_module(name)
        except ImportError:  # this Python was built without it, or a verifier has no use for it here
            continue
    sys.path[:] = [*sys.path, *path] if more else sys.path
    for name in more:
        importlib.import_module(name)
    warnings.simplefilter("ignore")
    # A traceback, or an exception in a finalizer, must not go and read source files to quote from.
    linecache.lazycache = lambda filename, module_globals: False
    sys.unraisablehook = lambda unraisable: None
    # From here on an import finds what is loaded or built in, and touches no file.
    sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    os.environ.clear()
    os.environ["TZ"] = "UTC0"  # else the C library would look for /etc/localtime
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH112,PTH208
        raise RuntimeError(f"preloading {more} started threads, and a process with threads must not fork")


def _try_filter() -> None:
    """Put the filter on a child that does nothing.

    Raises:
        OSError: it could not, or did not live to say so.
    """
    tried = layers.Filter()
    pid = os.fork()
    if not pid:
        code = 0
        try:
            tried.put_on()
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, f"prctl(PR_SET_SECCOMP): {os.strerror(code) if code > 0 else f'ended by signal {-code}'}")


def _receive(stream: BinaryIO) -> Any:  # JSON; None at the end
    size = stream.read(8)
    if len(size) < 8:
        return None
    body = stream.read(int.from_bytes(size, "big"))
    return json.loads(body)


def _send(stream: BinaryIO, message: object) -> None:
    body = json.dumps(message).encode("ascii")
    stream.write(len(body).to_bytes(8, "big") + body)
    stream.flush()
