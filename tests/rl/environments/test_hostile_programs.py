"""Hostile programs end within their limits, are worth nothing, and leave neither a process nor a file."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile_programs import FORGERIES, HOARDS, PROGRAMS

from nemo_bluelm.evaluate.scorers import make_scorer
from nemo_bluelm.rl.environments import Episode, Said, sandbox
from nemo_bluelm.rl.environments.code import Code

MARK = f"hostile-{os.getpid()}"
FOLDERS = ("/", "/etc", "/tmp", "/root", "/home", "/var/tmp", "/dev/shm", "/usr/lib", "/run", "/w", ".", "..")
SECONDS = 1.5
ASSERTIONS = {
    "equal": "assert add(1, 2) == 3",
    "close": "assert math.isclose(add(1, 2), 3) and abs(add(1, 2) - 3) < 1e-6",
    "listed": "def check(f):\n    assert [f(i, 1) for i in range(3)] == [1, 2, 3]\ncheck(add)",
    "not refused": "try:\n    add(1, 2)\n    assert False\nexcept ValueError: pass",
}


def namespaces() -> set[tuple[str, str]]:
    """Processes in PID namespaces other than ours."""
    own, found = os.readlink("/proc/self/ns/pid"), set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.readlink(f"/proc/{process}/ns/pid")
        except OSError:
            continue  # it has ended, or is another user's
        if namespace != own:
            found.add((process, namespace))
    return found


@pytest.fixture(scope="module")
def code():
    return make_scorer(Code, {"time_limit": SECONDS, "total_limit": 3.0, "memory": 256, "disk": 8}, "test")


@pytest.fixture(scope="module")
def outcomes(code):
    """Of all programs, four at a time: score and seconds; then what they left."""
    before = namespaces()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]

    def run(job):
        name, text, tests = job
        answer = f"```python\n{text.replace('MARK', MARK).replace('PORT', str(port))}\n```"
        begun = time.monotonic()
        score = code.score(Episode("code", {"tests": tests}, Said(None, answer)))
        return name, (score, time.monotonic() - begun)

    jobs = [(name, text, [{"input": "6 7\n", "output": "42\n"}]) for name, text in PROGRAMS.items()]
    jobs += [(f"forgery: {name}", text, list(ASSERTIONS.values())[:3]) for name, text in FORGERIES.items()]
    with ThreadPoolExecutor(4) as threads:
        found = dict(threads.map(run, jobs))
    with pytest.raises(BlockingIOError):  # nobody has come
        listener.accept()
    listener.close()
    assert namespaces() <= before
    assert not [folder for folder in FOLDERS if os.path.lexists(os.path.join(folder, MARK))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROGRAMS, *(f"forgery: {name}" for name in FORGERIES)])
def test_it_is_worth_nothing_and_ends(outcomes, name):
    score, seconds = outcomes[name]
    assert score.value == 0, score
    assert seconds < 15, "limits are 3 s; the rest is for a machine that is busy"


@pytest.mark.parametrize("name", HOARDS)
def test_memory_is_limited_wherever_it_is(name):
    limits = sandbox.Limits(seconds=30, memory=256 << 20, disk=8 << 20)
    outcome = sandbox.run({"main.py": HOARDS[name]}, ["main.py"], limits)
    assert outcome.clean and int(outcome.output) <= limits.memory, f"it got {int(outcome.output or -1) >> 20} MB"


@pytest.mark.parametrize("count, value", [("all", 0.0), ("share", 0.0)])
def test_a_part_of_the_tests_can_not_be_forged(code, count, value):
    part = make_scorer(Code, {"count": count, "time_limit": SECONDS}, "test")
    fields = {"tests": [ASSERTIONS["equal"], ASSERTIONS["not refused"]]}
    assert part.score(Episode("code", fields, Said(None, FORGERIES["equal to all"]))).value == value


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_isolation_holds_for_an_ordinary_user_too():
    python, setpriv = "/usr/bin/python3", shutil.which("setpriv")
    if setpriv is None or not os.access(python, os.X_OK):
        pytest.skip("needs setpriv and a Python that everyone may run")
    script = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[2])
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
sandbox.check_isolation("strong")
for name in ("fork bomb", "writing outside", "signals to all", "silent daemon"):
    text = sys.argv[3 + ("fork bomb", "writing outside", "signals to all", "silent daemon").index(name)]
    print(sandbox.run({"main.py": text}, ["main.py"], sandbox.Limits(seconds=1)).output)
"""
    root = Path(sandbox.__file__).parents[3]
    programs = [PROGRAMS[name] for name in ("fork bomb", "writing outside", "signals to all", "silent daemon")]
    command = [setpriv, "--reuid=54321", "--regid=54321", "--clear-groups", python, "-c", script]
    before = namespaces()
    done = subprocess.run([*command, root, sandbox.__file__, *programs], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["b''"] * 4
    assert namespaces() <= before


def test_the_program_ends_when_nobody_waits_any_more(tmp_path):
    """Its caller is killed: no signal reaches the program, yet the jail goes."""
    before = namespaces()
    script = (
        "from nemo_bluelm.rl.environments.sandbox import *\n"
        "p = Jailed({'main.py': 'import time; print(1, flush=True); time.sleep(10**6)'}, ['main.py'], Limits(300))\n"
        "import select; select.select([p.stdout], [], []); print('runs', flush=True); import time; time.sleep(300)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"runs\n" and namespaces() - before
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 20
    while namespaces() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert namespaces() <= before


def test_weak_isolation_limits_and_ends_all(tmp_path):
    """What escapes into another session is found and ended, the folder goes."""
    limits = sandbox.Limits(seconds=30, isolation="weak")
    program = (
        "import os, time\nprint(os.getcwd(), flush=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        print(os.getpid(), flush=True)\n        time.sleep(10**6)\n    os._exit(0)\ntime.sleep(0.3)"
    )
    outcome = sandbox.run({"main.py": program}, ["main.py"], limits)
    folder, pid = outcome.output.decode().split()
    assert outcome.clean and not os.path.exists(folder) and not os.path.exists(f"/proc/{pid}")


def test_without_isolation_it_refuses_in_one_line(monkeypatch):
    from nemo_bluelm.errors import UserError

    def refused(*_):
        raise sandbox.SandboxError("unshare: Operation not permitted")

    monkeypatch.setattr(sandbox, "run", refused)
    sandbox.check_isolation.cache_clear()
    with pytest.raises(UserError, match="Operation not permitted.*user namespaces.*isolation: weak"):
        make_scorer(Code, {}, "environment code")
    make_scorer(Code, {"isolation": "weak"}, "environment code")
    sandbox.check_isolation.cache_clear()
