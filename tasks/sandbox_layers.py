"""The walls around generated code: namespaces, Landlock and a seccomp filter, by ctypes alone.

Runs in the sandbox's child program, so it imports the standard library only. Each layer raises OSError, saying which
call the kernel refused, where it cannot be had. Linux on x86_64 was tested; the numbers for aarch64 are from the
kernel's header and were not run.
"""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import resource
import struct

NOBODY = 65534

# System calls by number on x86_64 and aarch64. What is in none of the tables ends the process: opening files, sockets,
# clone, exec, kill, ptrace, mount, and whatever a future kernel adds.
_ALLOWED = """
    read 0/63 lseek 8/62 fstat 5/80 mmap 9/222 munmap 11/215 mremap 25/216 mprotect 10/226 madvise 28/233 brk 12/214
    rt_sigaction 13/134 rt_sigprocmask 14/135 rt_sigreturn 15/139 sigaltstack 131/132 getpid 39/172 gettid 186/178
    getppid 110/173 getuid 102/174 geteuid 107/175 getgid 104/176 getegid 108/177 getrandom 318/278
    clock_gettime 228/113 clock_getres 229/114 clock_nanosleep 230/115 nanosleep 35/101 gettimeofday 96/169 time 201/-
    futex 202/98 exit 60/93 exit_group 231/94 sched_yield 24/124 getrusage 98/165 times 100/153 alarm 37/-
    setitimer 38/103 getitimer 36/102 rseq 334/293 set_robust_list 273/99 restart_syscall 219/128"""
_REFUSED = """
    ioctl 16/29 dup 32/23 dup2 33/- dup3 292/24 fcntl 72/25 close 3/57 close_range 436/436 poll 7/- ppoll 271/73
    select 23/- pselect6 270/72 uname 63/160 prctl 157/167 sysinfo 99/179 prlimit64 302/261 getrlimit 97/163
    pread64 17/67 readv 19/65 writev 20/66 pwrite64 18/68 sched_getaffinity 204/123 sched_getparam 143/121
    sched_getscheduler 145/120 sched_get_priority_max 146/125 sched_get_priority_min 147/126 getpgrp 111/-
    getpgid 121/155 getsid 124/156 getpriority 140/141 sync 162/81 fsync 74/82 fdatasync 75/83 flock 73/32
    umask 95/166 membarrier 324/283 pause 34/- wait4 61/260 waitid 247/95 getcpu 309/168 capget 125/90
    arch_prctl 158/- mincore 27/232 msync 26/227 mlock 149/228 rt_sigpending 127/136 rt_sigtimedwait 128/137
    rt_sigsuspend 130/133 set_tid_address 218/96 getgroups 115/158 getresuid 118/148 getresgid 120/150"""
_ABSENT = """
    stat 4/- lstat 6/- newfstatat 262/79 statx 332/291 access 21/- faccessat 269/48 faccessat2 439/439 readlink 89/-
    readlinkat 267/78 statfs 137/43 fstatfs 138/44 getcwd 79/17 getdents 78/- getdents64 217/61"""
_WRITE = (1, 64)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000

_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS, _SUBREAPER = 1, 4, 22, 38, 36
_NEW_USER, _NEW_MOUNT, _NEW_OTHERS = 0x10000000, 0x00020000, 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
_MS_PRIVATE, _MS_QUIET_READ_ONLY = (1 << 18) | (1 << 14), 1 | 2 | 4 | 8
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446


def unshare() -> None:
    """Enter namespaces of our own: network, processes, mounts, IPC, host name. The *next* fork is the first process."""
    if os.geteuid() == 0 and _libc().unshare(_NEW_MOUNT | _NEW_OTHERS) == 0:
        return
    _check(_libc().unshare(_NEW_USER | _NEW_MOUNT | _NEW_OTHERS), "unshare")


def empty_root() -> None:
    """Put an empty read-only file system in place of the machine's, in this mount namespace alone."""
    _check(_libc().mount(b"none", b"/", None, _MS_PRIVATE, None), "mount / private")
    place = b"/tmp" if os.path.isdir("/tmp") else b"/dev"  # noqa: PTH112 - pathlib is not loaded here
    _check(_libc().mount(b"none", place, b"tmpfs", _MS_QUIET_READ_ONLY, b"size=4k,mode=555"), "mount tmpfs")
    os.chroot(place)
    os.chdir("/")


def drop_privileges() -> None:
    """Be nobody, without capabilities, for good; no process of this user can then trace us."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # a root that may not even do that has little to give up
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc().capset(header, none), "capset")
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_DUMPABLE, 0)


def restrict_files() -> None:
    """Landlock, all that this kernel's version of it can deny: every file, TCP, and signals to the outside."""
    version = _libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    _check(version, "landlock_create_ruleset")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _libc().syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    _check(rules, "landlock_create_ruleset")
    _prctl(_NO_NEW_PRIVS, 1)
    _check(_libc().syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


def adopt_orphans() -> None:
    """Become the parent of whatever descendants lose theirs."""
    _prctl(_SUBREAPER, 1)


def lower_limit(limit: int, value: int) -> None:
    """A resource limit for good, unless it is lower already or not known here."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(limit, (value, value))


def die_with_parent() -> None:
    """Be killed when the process that forked us ends (it must have one thread)."""
    _prctl(_PDEATHSIG, 9)


class Filter:
    """The seccomp filter, built once and put on in each child.

    Raises:
        OSError: this machine is of another architecture, or no Linux.
    """

    def __init__(self) -> None:
        machine = platform.machine()
        if os.uname().sysname != "Linux" or machine not in _AUDIT_ARCH:
            raise OSError(errno.ENOSYS, f"seccomp: no filter for {os.uname().sysname} on {machine}")
        program = _program(machine)
        self._code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("@HP", len(program) // 8, ctypes.addressof(self._code))
        self._header = ctypes.create_string_buffer(header, len(header))
        self._call = _libc().prctl

    def put_on(self) -> None:
        """For this process and for good; privileges were dropped before."""
        _check(self._call(_SECCOMP, 2, ctypes.byref(self._header), 0, 0), "prctl(PR_SET_SECCOMP)")


def _program(machine: str) -> bytes:
    column = list(_AUDIT_ARCH).index(machine)
    verdicts = [(_ALLOWED, _ALLOW), (_REFUSED, _ERRNO | errno.EPERM), (_ABSENT, _ERRNO | errno.ENOENT)]
    cases = [(number, verdict) for table, verdict in verdicts for number in _numbers(table, column)]
    returns = [_ALLOW, _ERRNO | errno.EPERM, _ERRNO | errno.ENOENT, _KILL]
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 4, _WRITE[column]),  # only to standard output, standard error and the result channel
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_AT_LEAST, 0, 1, 4),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for place, (number, verdict) in enumerate(cases):
        code.append((_EQUAL, len(cases) - place - 1 + 1 + returns.index(verdict), 0, number))
    code.append((_RETURN, 0, 0, _KILL))
    code += [(_RETURN, 0, 0, value) for value in returns]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _numbers(table: str, column: int) -> list[int]:
    words = table.split()[1::2]
    return [int(number) for number in (word.split("/")[column] for word in words) if number != "-"]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, value, 0, 0, 0), f"prctl({option})")


def _check(answer: int, call: str) -> None:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
