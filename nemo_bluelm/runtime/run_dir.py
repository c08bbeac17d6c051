"""The folder of a run: its files, its checkpoints, which one to go on from. No torch, so that asking is quick."""

import json
import re
from pathlib import Path
from typing import NamedTuple, Optional

from nemo_bluelm.config.schema import Part
from nemo_bluelm.errors import UserError

CHECKPOINT_PREFIX = "step_"
WEIGHTS_DIR = "weights"  # NeMo's name
RECIPE_FILE, TOKENIZER_FILE = "recipe.yaml", "tokenizer.json"  # beside the weights in every checkpoint
METRICS_FILE = "metrics.jsonl"
COMPLETE_FILE = "complete"  # there once the last step's checkpoint is; holds the step
LOCK_FILE = ".lock"  # held by the run that writes into the folder


class Origin(NamedTuple):
    """Where parts of a fresh run's model come from; ``key`` is the recipe's that says so."""

    key: str
    checkpoint: Path
    parts: tuple[Part, ...]

    def parts_there(self) -> set[Part]:
        """Those of them that the checkpoint has."""
        return parts_in(self.checkpoint) & set(self.parts)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return run_dir / "checkpoints" / f"{CHECKPOINT_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def published(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder has its name only once everything in it is written."""
    folders = (run_dir / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*")
    return sorted((f for f in folders if re.fullmatch(rf"{CHECKPOINT_PREFIX}\d{{8,}}", f.name)), key=step_of)


def newest(run_dir: Path) -> Optional[Path]:
    """The checkpoint to go on from, if there is one."""
    return next(reversed(published(run_dir)), None)


def read_metrics(run_dir: Path) -> list[dict]:
    """The metrics of a run, a dict a step; a last line that was cut off is none.

    Raises:
        UserError: a line is no step's.
    """
    path, rows = run_dir / METRICS_FILE, []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is {line.strip()[:40]!r}, no step's metrics; remove it") from error
    return rows


def resolve_checkpoint(path: str, key: str) -> Path:
    """The checkpoint that a run folder (its newest) or a checkpoint folder names.

    Args:
        key: the recipe key or flag that said so, for the message.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    checkpoint = folder if (folder / WEIGHTS_DIR).is_dir() else newest(folder)
    if checkpoint is None:
        what = "has no checkpoint" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{key} is {path}, which {what}; give a run folder or one of its checkpoints/{CHECKPOINT_PREFIX}* folders"
        )
    for name in (WEIGHTS_DIR, RECIPE_FILE, TOKENIZER_FILE):
        if not (checkpoint / name).exists():
            raise UserError(f"{key}: {checkpoint} is not a complete checkpoint, {name} is missing; choose another step")
    return checkpoint.resolve()


def parts_in(checkpoint: Path) -> set[Part]:
    """The parts of the model that a checkpoint has weights of; all of them where its list of tensors can't be read."""
    try:
        # A pickle of Megatron-Core's classes: slow to load, and the names in it stand there plainly.
        names = (checkpoint / WEIGHTS_DIR / ".metadata").read_bytes()
    except OSError:
        return set(Part)
    return {part for part in Part if f"module.{part.value}.".encode() in names} or set(Part)
