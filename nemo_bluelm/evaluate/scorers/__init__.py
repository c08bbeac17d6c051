"""Scorers by name: letters and words, exact and near texts, mathematics, boxes and points, instructions,
a judge."""

from collections.abc import Mapping
from typing import Any, Optional, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm.config.pipeline import check_keys
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer
from nemo_bluelm.evaluate.scorers.box import Iou, Point
from nemo_bluelm.evaluate.scorers.choice import Letter, Word
from nemo_bluelm.evaluate.scorers.instructions import Instructions
from nemo_bluelm.evaluate.scorers.judge import Judge
from nemo_bluelm.evaluate.scorers.mathematics import Math
from nemo_bluelm.evaluate.scorers.text import Anls, Exact

__all__ = ["SCORERS", "Score", "Scorer", "make_scorer", "make_scorers"]

Made = TypeVar("Made")

SCORERS = {scorer.name: scorer for scorer in (Letter, Word, Math, Exact, Anls, Iou, Point, Instructions, Judge)}


def make_scorers(entries: Mapping[str, Any], where: str) -> list[Scorer]:
    """Scorers from a task's ``scorers``, checked.

    Args:
        entries: options, or None for none, by the scorer's name.

    Raises:
        UserError: naming ``where``, the scorer and the option.
    """
    check_keys(entries, tuple(SCORERS), f"{where}: scorers", "scorers")
    return [make_scorer(SCORERS[name], options, f"{where}: scorer {name}") for name, options in entries.items()]


def make_scorer(kind: type[Made], options: Optional[Mapping[str, Any]], where: str) -> Made:
    """A dataclass with ``name`` and ``check()``, its fields from options.

    Raises:
        UserError: naming ``where`` and the option.
    """
    schema = OmegaConf.structured(kind)
    check_keys(options or {}, tuple(schema), where, kind.name)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(schema, options or {}))
        made.check()
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return made
