"""Runs Python programs that nobody has read: in a jail, with limits, and with what they say read as plain bytes.

Needs Linux 5.12, on x86_64 or aarch64, and user namespaces; neither root nor a further program.
"""

import functools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_bluelm.errors import UserError

ISOLATIONS = ("strong", "weak")
_JAIL = Path(__file__).with_name("jail.py")
_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
_START = 60.0  # seconds until a jail stands, on a machine that is busy
_CHUNK = 1 << 16


class SandboxError(Exception):
    """A program could not be run at all; it says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        seconds: of wall clock for the program; of CPU time for each of its processes.
        memory: bytes of address space of each of its processes. All together may have as much as ``memory * processes
            + disk``; memory that no address space counts, such as System V's or a memfd's, is refused.
        processes: and threads, that it may have at a time, itself included.
        disk: bytes of the files that it may write; they are in memory.
        output: bytes that it may print.
        isolation: ``strong``; or ``weak``: the limits alone. The program may then read and write what the caller may,
            use the network, and get memory that no address space counts.
    """

    seconds: float = 5.0
    memory: int = 512 << 20
    processes: int = 8
    disk: int = 32 << 20
    output: int = 1 << 20
    isolation: str = "strong"


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended: "exit", "signal", "time", "output" (it printed too much) or "killed" (nobody waited for it any more).
        code: of its exit, or number of the signal.
        output: what it printed, to the limit.
    """

    ended: str
    code: int
    output: bytes

    @property
    def clean(self) -> bool:
        """Whether it ran to its end and reported no error."""
        return self.ended == "exit" and self.code == 0


class Jailed:
    """A program that runs. Close it, or it and its jail stay until they reach their limits.

    Args:
        files: texts by their names, in the folder that it runs in.
        command: file and arguments for Python.
    """

    def __init__(self, files: Mapping[str, str], command: Sequence[str], limits: Limits):
        self.limits, self.output = limits, bytearray()
        self.pending = bytearray()  # for its standard input
        self.ends_input = False  # after what is pending
        self.floods = False
        self._folder = tempfile.mkdtemp(prefix="program-") if limits.isolation == "weak" else None
        self._status, status = os.pipe()
        lifeline, self._lifeline = os.pipe()
        task = {
            **{name: getattr(limits, name) for name in ("seconds", "memory", "processes", "disk", "isolation")},
            **{"files": dict(files), "command": list(command), "python": _PYTHON, "prefix": sys.base_prefix},
            **{"status": status, "lifeline": lifeline, "folder": self._folder},
        }
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(task).encode())
            file.seek(0)
            try:
                self._process = subprocess.Popen(
                    [_PYTHON, "-I", "-S", str(_JAIL), str(file.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(file.fileno(), status, lifeline),
                    start_new_session=True,
                    cwd="/",
                    env={},
                    bufsize=0,
                )
            except OSError as error:
                os.close(self._status)
                os.close(self._lifeline)
                raise SandboxError(f"no jail can be started: {error}") from error
            finally:
                os.close(status)
                os.close(lifeline)
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        for stream in (self.stdin, self.stdout):
            os.set_blocking(stream.fileno(), False)

    def finish(self) -> Outcome:
        """How it ended.

        Raises:
            SandboxError: it never ran.
        """
        try:
            self._process.wait(self.limits.seconds + _START)
        except subprocess.TimeoutExpired:
            raise SandboxError("the jail does not end") from None
        found = json.loads(os.read(self._status, 4096) or '{"ended": "error", "problem": "the jail broke"}')
        if found["ended"] == "error":
            raise SandboxError(f"the program can't be run: {found['problem']}")
        return Outcome("output" if self.floods else found["ended"], found.get("code", 0), bytes(self.output))

    def kill(self) -> None:
        """End the program and all that it started."""
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._lifeline = None

    def close(self) -> None:
        self.kill()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.stdin.close()
        self.stdout.close()
        os.close(self._status)

    def __enter__(self) -> "Jailed":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def run(files: Mapping[str, str], command: Sequence[str], limits: Limits, stdin: bytes = b"") -> Outcome:
    """Run a program to its end.

    Raises:
        SandboxError: it could not be run.
    """
    with Jailed(files, command, limits) as jailed:
        jailed.pending += stdin
        jailed.ends_input = True
        pump([jailed], lambda _, __: None)
        return jailed.finish()


def pump(programs: Sequence[Jailed], heard: Callable[[Jailed, bytes], None]) -> None:
    """Write what is pending and read what is printed until the first program has ended or closed its output.

    Args:
        heard: is told of each piece that a program printed, and of nothing when no more comes.
    """
    deadline = time.monotonic() + programs[0].limits.seconds + _START
    with selectors.DefaultSelector() as selector:
        for program in programs:
            selector.register(program.stdout, selectors.EVENT_READ, program)
        while programs[0].stdout in selector.get_map():
            for program in programs:
                _register_input(selector, program)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for key, _ in ready:
                program = key.data
                if key.fileobj is program.stdin:
                    _write(program)
                    continue
                piece = os.read(program.stdout.fileno(), _CHUNK)
                room = program.limits.output - len(program.output)
                program.output += piece[:room]
                if len(piece) > room:
                    program.floods, piece = True, b""
                    program.kill()
                if not piece:
                    selector.unregister(program.stdout)
                heard(program, piece)


def _register_input(selector: selectors.BaseSelector, program: Jailed) -> None:
    stream = program.stdin
    if not program.pending and program.ends_input and not stream.closed:
        if stream in selector.get_map():
            selector.unregister(stream)
        stream.close()
    if stream.closed:
        return
    if program.pending and stream not in selector.get_map():
        selector.register(stream, selectors.EVENT_WRITE, program)
    elif not program.pending and stream in selector.get_map():
        selector.unregister(stream)


def _write(program: Jailed) -> None:
    try:
        del program.pending[: os.write(program.stdin.fileno(), program.pending[:_CHUNK])]
    except BlockingIOError:
        pass
    except BrokenPipeError:  # it reads no more
        program.pending.clear()
        program.ends_input = True


_PROBE = """
import ctypes, json, os, socket
found = {"process 1": os.getpid() == 1, "another user": os.getuid() != 0 and os.geteuid() != 0}
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
try:
    open("/probe", "w")
    found["files"] = False
except OSError:
    found["files"] = not os.path.exists("/proc") and not os.path.exists("/root/.ssh") and not os.path.exists("/home")
found["network"] = [name for _, name in socket.if_nameindex() if name != "lo"] == []
found["descriptors"] = not any(is_open(number) for number in range(3, 64))
found["namespaces"] = ctypes.CDLL(None).unshare(0x10000000) != 0
try:
    os.memfd_create("probe")
    found["memory"] = False
except OSError:
    found["memory"] = True
children = 0
try:
    while children < 8:
        if os.fork() == 0:
            os.read(0, 1)
            os._exit(0)
        children += 1
except OSError:
    pass
found["processes"] = children == 3
print(json.dumps(found))
"""


@functools.cache
def check_isolation(isolation: str) -> None:
    """Try what the jail must prevent.

    Raises:
        UserError: it can't be had here, and what it needs.
    """
    if isolation == "weak":
        return
    limits = replace(Limits(seconds=20), processes=4)
    try:
        outcome = run({"probe.py": _PROBE}, ["probe.py"], limits)
        found = json.loads(outcome.output) if outcome.clean else {f"the probe ({outcome.ended} {outcome.code})": False}
        missing = [name for name, holds in found.items() if not holds]
        problem = f"no isolation of {', '.join(missing)}" if missing else ""
    except SandboxError as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"programs can't be run safely here ({problem}): it needs Linux 5.12 with user namespaces "
            "(kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, a container that "
            "may unshare and mount); or set isolation: weak, which limits them but lets them read, write and connect"
        )
