"""Stands in for training in the launcher's tests: imported by Python at start when this folder is on PYTHONPATH.

FAKE_TRAINING says what ``nemo_bluelm.train.run.train`` does on each rank.
"""

import os
import signal
import sys
import time
import types
from pathlib import Path


def _train(recipe, make_job) -> int:
    from nemo_bluelm.errors import UserError

    rank, behaviour = int(os.environ["RANK"]), os.environ["FAKE_TRAINING"]
    Path(os.environ["FAKE_OUT"], f"rank{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    if behaviour == "mistake":
        raise UserError("data.root: no such folder")
    if behaviour == "mistake of rank 1":
        if rank == 1:
            raise UserError("shard 7: not a tar file")
        time.sleep(0.3)
        raise RuntimeError("connection closed by peer")
    if behaviour == "bug of rank 1" and rank == 1:
        raise RuntimeError("boom")
    if behaviour == "rank 1 killed" and rank == 1:
        while not Path(os.environ["FAKE_OUT"], "rank0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "saves on signal":

        def save(number, frame):
            Path(os.environ["FAKE_OUT"], f"saved{rank}").write_text(str(number))
            sys.exit(128 + number)

        signal.signal(signal.SIGINT, save)
        signal.signal(signal.SIGTERM, save)
        Path(os.environ["FAKE_OUT"], f"ready{rank}").touch()
    if behaviour != "works":
        time.sleep(60)
    return 0


if "RANK" in os.environ and "FAKE_TRAINING" in os.environ:
    module = types.ModuleType("nemo_bluelm.train.run")
    module.train = _train
    sys.modules[module.__name__] = module
