"""Index shards in processes of their own. They import no torch and nothing of the program that started them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from nemo_bluelm.children import python_environment
from nemo_bluelm.data.indexing import Facts, Indexer, Task
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry


def run(
    tasks: Sequence[Task],
    workers: int,
    root: str,
    folder: Path,
    geometry: Geometry,
    tokenizer: Tokenizer,
    progress: Callable[[int], None],
    done: Callable[[Task, Facts], None],
) -> None:
    """Index ``tasks`` in ``workers`` processes; when this call ends, however it ends, they have ended too.

    Args:
        progress: called with a number of further samples.
        done: called with each task and its facts, once they are committed.

    Raises:
        UserError: as :meth:`Indexer.index`; a worker was killed.
    """
    waiting = list(reversed(tasks))
    pool = [_Worker((root, folder, geometry, tokenizer.path, tokenizer.digest)) for _ in range(workers)]
    try:
        busy = {}
        for worker in pool:
            if waiting:
                busy[worker.give(waiting.pop())] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                answer = worker.answer()
                if isinstance(answer, int):
                    progress(answer)
                    continue
                done(worker.task, answer)
                del busy[connection]
                if waiting:
                    busy[worker.give(waiting.pop())] = worker
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process that runs this module."""

    task: Task

    def __init__(self, arguments: tuple):
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **python_environment()},
        )
        theirs.close()
        self._connection.send(arguments)

    def give(self, task: Task) -> Connection:
        self.task = task
        self._connection.send(task)
        return self._connection

    def answer(self) -> int | Facts:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            if code >= 0:
                raise RuntimeError(f"the process that indexed {self.task.shard} ended with code {code}") from None
            raise UserError(
                f"the process that indexed {self.task.shard} was killed by signal {-code}, perhaps for memory; use "
                "fewer workers"
            ) from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def stop(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait()


def _serve(connection: Connection) -> None:
    root, folder, geometry, path, digest = connection.recv()
    tokenizer = Tokenizer.load(path)
    if tokenizer.digest != digest:
        raise UserError(f"tokenizer {path} changed while shards were indexed with it; index them again")
    indexer = Indexer(root, folder, geometry, tokenizer)
    while True:
        connection.send(indexer.index(connection.recv(), connection.send))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, whom Ctrl-C reaches too, stops us
    connection = Connection(int(sys.argv[1]))
    try:
        _serve(connection)
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone


if __name__ == "__main__":
    main()
