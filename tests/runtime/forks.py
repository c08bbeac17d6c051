"""Commands like those of ``processes``, in forks of one process: seconds each, for runs whose start is not tested."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from tests.runtime.processes import CHECKOUT, TRAIN

SERVER = Path(__file__).with_name("fork_server.py")


class Forks:
    """A server of forks with one thread each, and what they leave in ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        with (folder / "imports.out").open("w") as noise:
            self.server = subprocess.Popen(
                [sys.executable, SERVER, folder],
                cwd=CHECKOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=noise,
                stderr=noise,
                text=True,
            )

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def start(self, *arguments, **environment: str) -> "Fork":
        """The fork of a command; ``arguments`` begin as those of ``processes.start`` do."""
        arguments = [str(argument) for argument in arguments]
        assert tuple(arguments[:3]) == TRAIN
        self.count += 1
        fork = Fork(self, str(self.count))
        request = {"name": fork.name, "arguments": arguments[2:], "environment": environment}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return fork

    def start_ranks(self, processes: int, *arguments) -> list["Fork"]:
        """A fork for each rank of a job, as another launcher than ours would start them."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        world = {name: str(value) for name, value in world.items()}
        forks = [self.start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(processes)]
        for fork in forks:
            fork.store = store  # lives as long as they do
        return forks

    def run(self, *arguments, ranks: int = 1) -> str:
        """Output of a command that must succeed on every rank."""
        forks = self.start_ranks(ranks, *arguments) if ranks > 1 else [self.start(*arguments)]
        outputs = []
        for fork in forks:
            code, output = fork.finish(timeout=240)
            assert code == 0, output[-3000:]
            outputs.append(output)
        return "".join(outputs)


class Fork:
    """One command."""

    def __init__(self, forks: Forks, name: str):
        self.forks, self.name = forks, name

    def running(self) -> bool:
        return not (self.forks.folder / f"{self.name}.code").exists()

    def finish(self, timeout: float) -> tuple[int, str]:
        """Exit code and output; the process is killed at the timeout (seconds), which fails the test."""
        folder, end = self.forks.folder, time.monotonic() + timeout
        while self.running():
            noise = (folder / "imports.out").read_text()
            assert self.forks.server.poll() is None, noise
            if time.monotonic() > end:
                os.killpg(self._pid(), signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s; last output:\n{self._output()[-2000:]}")
            time.sleep(0.05)
        assert (folder / "imports.out").read_text() == "", "the imports are silent"
        assert self._group_ends(), "processes are left behind"
        return int((folder / f"{self.name}.code").read_text()), self._output()

    def _group_ends(self, patience: float = 5.0) -> bool:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                os.killpg(self._pid(), 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        return False

    def _pid(self) -> int:
        return int((self.forks.folder / f"{self.name}.pid").read_text())

    def _output(self) -> str:
        return (self.forks.folder / f"{self.name}.out").read_text()
