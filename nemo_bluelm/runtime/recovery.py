"""Which checkpoint the ranks of a job go on from, when a crash or a disk may have torn one."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.checksums import CHECKSUMS_FILE, find_damage
from nemo_bluelm.runtime.environment import Launch
from nemo_bluelm.runtime.run_dir import Origin, checkpoint_path, published, step_of

DAMAGED = ".damaged"  # ends the name of a checkpoint that is set aside
_TIMEOUT = timedelta(hours=2)  # for the slowest rank to read its share of a checkpoint


class Ranks:
    """The ranks of a job before their process groups are there: what one says, all hear."""

    def __init__(self, launch: Launch):
        self.rank, self.size = launch.rank, launch.world_size
        self._asked = 0
        self._store = None
        if self.size > 1:
            from torch.distributed import rendezvous

            self._store, *_ = next(rendezvous("env://"))  # init_process_group finds the same server again
            self._store.set_timeout(_TIMEOUT)

    def all(self, text: str) -> list[str]:
        """What each rank says, by rank; every rank must call it."""
        if self._store is None:
            return [text]
        self._asked += 1
        place = f"nemo_bluelm/{self._asked}"
        self._store.set(f"{place}/{self.rank}", text)
        return [self._store.get(f"{place}/{rank}").decode() for rank in range(self.size)]

    def find_damage(self, checkpoint: Path) -> Optional[str]:
        """As :func:`nemo_bluelm.runtime.checksums.find_damage`, each rank reading its share; the same on all ranks."""
        return next(filter(None, self.all(find_damage(checkpoint, self.rank, self.size) or "")), None)


def published_steps(run_dir: Path, ranks: Ranks) -> list[int]:
    """Steps of the complete checkpoints of a run as rank 0 sees them, oldest first."""
    return [int(step) for step in ranks.all(" ".join(str(step_of(path)) for path in published(run_dir)))[0].split()]


def newest_whole(run_dir: Path, steps: list[int], ranks: Ranks) -> Path:
    """The newest checkpoint that is what was written. Newer ones are set aside under another name, which is told.

    Args:
        steps: those that there are; not empty.

    Raises:
        UserError: none of them is; all are left where they are.
    """
    damaged: list[tuple[Path, str]] = []
    checkpoints = [checkpoint_path(run_dir, step) for step in reversed(steps)]
    listed = [(checkpoint / CHECKSUMS_FILE).exists() for checkpoint in checkpoints]
    for checkpoint, has_list in zip(checkpoints, listed):
        lost = f"{CHECKSUMS_FILE} is missing" if any(listed) and not has_list else ""
        damage = next(filter(None, ranks.all(lost)), None) or ranks.find_damage(checkpoint)
        if damage is None:
            if ranks.rank == 0:
                for other, reason in damaged:
                    aside = _set_aside(other)
                    print(
                        f"checkpoint {other} is damaged: {reason}; it is {aside.name} now, and the run goes on from "
                        f"{checkpoint.name}",
                        file=sys.stderr,
                    )
            return checkpoint
        damaged.append((checkpoint, damage))
    newest, reason = damaged[0]
    raise UserError(
        f"checkpoint {newest} is damaged: {reason}; none before it is whole: bring one back, or remove "
        f"{newest.parent} to begin anew"
    )


def check_whole(origin: Origin, ranks: Ranks) -> None:
    """
    Raises:
        UserError: the checkpoint that a run is to start from is not what was written.
    """
    if damage := ranks.find_damage(origin.checkpoint):
        raise UserError(
            f"{origin.key}: checkpoint {origin.checkpoint} is damaged: {damage}; choose another, or make it again"
        )


def _set_aside(checkpoint: Path) -> Path:
    number, aside = 1, checkpoint.with_name(f"{checkpoint.name}{DAMAGED}")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}.{number}")
    os.replace(checkpoint, aside)
    return aside
