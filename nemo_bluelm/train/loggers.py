"""A run's metrics for TensorBoard and Weights & Biases, beside ``metrics.jsonl``."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_bluelm.config.schema import LogConfig, Recipe, WandbMode
from nemo_bluelm.errors import UserError

TENSORBOARD_DIR = "tensorboard"  # in the run folder


class Loggers:
    """The loggers that a recipe asks for; on rank 0 only.

    Args:
        start: step after which the run begins or goes on; what a logger has of later ones is replaced.

    Raises:
        UserError: a package is missing; Weights & Biases refuses.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start: int):
        check_loggers(recipe.log)
        self._tensorboard = self._wandb = None
        if recipe.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=start + 1)
        if recipe.log.wandb.mode is not WandbMode.disabled:
            self._wandb = _open_wandb(recipe, run_dir)

    def write(self, row: dict[str, Any]) -> None:
        """A step's line of ``metrics.jsonl``."""
        numbers = dict(_numbers(row))
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_loggers(log: LogConfig) -> None:
    """
    Raises:
        UserError: a logger is asked for that isn't installed.
    """
    for package, wanted, key in (
        ("tensorboard", log.tensorboard, "log.tensorboard=false"),
        ("wandb", log.wandb.mode is not WandbMode.disabled, "log.wandb.mode=disabled"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{package} isn't installed; pip install {package}, or set {key}")


def _open_wandb(recipe: Recipe, run_dir: Path) -> Any:
    import wandb
    from omegaconf import OmegaConf

    mode = recipe.log.wandb.mode
    if mode is WandbMode.online and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise UserError("log.wandb.mode is online, but WANDB_API_KEY isn't set; set it, or log.wandb.mode=offline")
    try:
        return wandb.init(
            project=recipe.log.wandb.project,
            name=recipe.name,
            id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],  # a resumed run is the same
            resume="allow",
            mode=mode.value,
            dir=str(run_dir),
            config=OmegaConf.to_container(OmegaConf.structured(recipe), enum_to_str=True),
            settings=wandb.Settings(silent=True, disable_git=True, console="off", x_disable_stats=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"log.wandb: {' '.join(str(error).split())}; set log.wandb.mode=offline") from error


def _numbers(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield f"{prefix}{key}", value
