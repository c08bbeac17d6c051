"""Processes that reward replies beside the generation of others; one that takes too long is killed."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Optional

from nemo_bluelm.children import python_environment
from nemo_bluelm.config.rewards import EnvironmentConfig
from nemo_bluelm.rl.environments.base import Episode, Reward

_START = 120.0  # seconds until a process is ready, on a machine that is busy
_WORKER = "nemo_bluelm.rl.environments.worker"


class Pool:
    """Rewards replies in ``config.num_workers`` processes, in the order of their submission.

    Args:
        unscored: makes the reward of a reply from the reason why nobody can tell, and flags of ``Reward``.
    """

    def __init__(self, config: EnvironmentConfig, name: str, unscored: Callable[..., Reward]):
        self._config, self._name, self._unscored = config, name, unscored
        self._jobs: queue.SimpleQueue[Optional[tuple[Episode, Future]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(config.num_workers)]
        self._started = False

    def submit(self, episode: Episode) -> "Future[Reward]":
        """Put a reply into the queue; a pool that is closed cancels it."""
        future: Future[Reward] = Future()
        with self._lock:
            if self._closing.is_set():
                future.cancel()
                return future
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._jobs.put((episode, future))
        return future

    def close(self) -> None:
        """End all processes; replies whose turn hasn't come are cancelled, those that are being scored unscored."""
        with self._lock:
            self._closing.set()
            for worker in self._running:
                worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        if self._started:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        worker: Optional[_Worker] = None
        while (job := self._jobs.get()) is not None:
            episode, future = job
            if self._closing.is_set():
                future.cancel()
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker, reward = self._rewarded(worker, episode)
            except BaseException as error:  # else whoever waits for it waits for ever
                future.set_exception(error)
            else:
                future.set_result(reward)
        self._end(worker)

    def _rewarded(self, worker: Optional["_Worker"], episode: Episode) -> tuple[Optional["_Worker"], Reward]:
        """The reward, and the process that goes on living."""
        if worker is None or not worker.alive():
            self._end(worker)
            worker = self._new()
        problem = worker.ready(_START)
        if problem:
            self._end(worker)
            return None, self._unscored(f"its process can't work: {problem}", failed=True)
        begun = time.monotonic()
        try:
            reward = worker.ask(episode, self._config.timeout)
        except (EOFError, OSError):
            self._end(worker)
            return None, self._unscored("a reward ended its process", failed=True, seconds=time.monotonic() - begun)
        seconds = time.monotonic() - begun
        if reward is None:
            self._end(worker)
            reason = f"no reward within {self._config.timeout:g} s"
            return None, self._unscored(reason, timed_out=True, seconds=seconds)
        return worker, replace(reward, seconds=seconds)

    def _new(self) -> "_Worker":
        worker = _Worker(self._config, self._name)
        with self._lock:
            self._running.add(worker)
            if self._closing.is_set():
                worker.kill()
        return worker

    def _end(self, worker: Optional["_Worker"]) -> None:
        if worker is not None:
            with self._lock:
                self._running.discard(worker)
            worker.close()


class _Worker:
    """One process, in a session of its own."""

    def __init__(self, config: EnvironmentConfig, name: str):
        self._connection, there = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(there.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(there.fileno(),),
                start_new_session=True,
                env={**os.environ, **python_environment()},
            )
        finally:
            there.close()
        self._ready = False
        self._greeting = (config, name, list(sys.path))

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ready(self, seconds: float) -> str:
        """Wait until it takes a reply; what keeps it from that, if anything does."""
        try:
            if self._greeting is not None:
                self._connection.send(self._greeting)
                self._greeting = None
            if not self._connection.poll(seconds):
                return f"it did not start within {seconds:g} s"
            return self._connection.recv() or ""
        except (EOFError, OSError):
            return "it ended"

    def ask(self, episode: Episode, seconds: float) -> Optional[Reward]:
        """The reward, or None if it takes longer.

        Raises:
            EOFError, OSError: the process has ended.
        """
        connection: Connection = self._connection
        connection.send(episode.light())
        return connection.recv() if connection.poll(seconds) else None

    def kill(self) -> None:
        """End it and what it started, but for what has left its session. Not after ``close``."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._connection.close()
