"""What disks do to checkpoints, told in one line: unreadable ones, full or read-only folders."""

import errno
import logging
import os
import pickle
import queue
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.checksums import CHECKSUMS_FILE, find_damage

# What PyTorch and Megatron-Core raise on files that are missing, cut, overwritten or of another program.
UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, AttributeError, TypeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, CheckpointingException, CheckpointException),
)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
# In messages without an error number: Megatron-Core's of a writer elsewhere, PyTorch's of a file that torch.save began.
_CUT_OFF = ("Worker failure", "inline_container.cc")


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Around the loading of a checkpoint's weights.

    Raises:
        UserError: they can't be read.
        RuntimeError: they can, but a rank is gone: whoever started the ranks starts them again.
    """
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        listed = (Path(checkpoint) / CHECKSUMS_FILE).exists()
        if isinstance(error, RuntimeError) and listed and find_damage(Path(checkpoint)) is None:
            raise
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({reason}); remove that folder to go on from the one before, or name "
            "another"
        ) from error


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Around a run that writes into its folder.

    Raises:
        UserError: the disk is full, read-only or broken.
    """
    logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)  # it would say the same a second time
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        # Checkpoints are written by worker processes, whose errors arrive as text.
        number = getattr(error, "errno", None) or next(map(int, re.findall(r"\[Errno (\d+)\]", str(error))), None)
        of_a_writer = isinstance(error, CheckpointException) or any(words in str(error) for words in _CUT_OFF)
        if number not in UNWRITABLE and not of_a_writer:
            raise
        reason = os.strerror(number) if number else "a checkpoint was cut off"
        free = shutil.disk_usage(run_dir).free // 2**20
        raise UserError(
            f"run_dir {run_dir} can't be written: {reason}, {free} MiB are free; make room or mend it, then type the "
            "same command to go on from the newest checkpoint"
        ) from error


def save_weights(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state as the weights of a checkpoint, outside a training run; ``folder`` is empty."""
    without_manager()
    dist_checkpointing.save(state, str(folder))


def without_manager() -> None:
    """Before Megatron writes: its default is a manager process, which outlives a process that is killed hard."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()
