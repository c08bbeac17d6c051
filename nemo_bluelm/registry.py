"""Parts by name: those of this package, of decorators, and of installed packages' entry points. Nothing heavy."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from nemo_bluelm.errors import UserError

Entry = TypeVar("Entry", bound=Callable)


class Registry:
    """
    Args:
        group: of entry points.
        known: entries by their names; a text is MODULE:NAME, imported when it is asked for.
    """

    def __init__(self, group: str, known: Mapping[str, Callable | str] = ()):
        self._group = group
        self._entries = {name: entry for name, entry in dict(known).items() if not isinstance(entry, str)}
        self._later = {
            name: EntryPoint(name, entry, group) for name, entry in dict(known).items() if isinstance(entry, str)
        }

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator: gives a class or function its name."""

        def put(entry: Entry) -> Entry:
            taken = self._entries.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (entry.__module__, entry.__qualname__):
                raise UserError(f"{self._group}: {name} is {taken.__module__}.{taken.__qualname__} already; rename one")
            if inspect.isclass(entry):
                entry.name = name
            self._entries[name] = entry
            return entry

        return put

    def find(self, name: str, where: str) -> Any:
        """
        Raises:
            UserError: naming ``where``; there is none of this name, or its package can't be imported.
        """
        if name not in self._entries:
            points = {point.name: point for point in entry_points(group=self._group)} | self._later
            if name not in points:
                names = sorted({*self._entries, *points})
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
                raise UserError(
                    f"{where}: no {self._group} entry {name}; {hint} Another package's is found by "
                    f"its entry point of the group {self._group}"
                )
            try:
                self.register(name)(points[name].load())
            except (ImportError, AttributeError) as error:
                raise UserError(f"{where}: {name} can't be imported from {points[name].value}: {error}") from error
        return self._entries[name]


STAGES = Registry(
    "nemo_bluelm.stages",
    {
        "next_token": "nemo_bluelm.train.job:NextToken",
        "grpo": "nemo_bluelm.rl.job:GRPO",
        "reward_model": "nemo_bluelm.rl.reward_job:RewardModelling",
    },
)
VISION_TOWERS = Registry("nemo_bluelm.vision_towers", {"siglip2": "nemo_bluelm.model.vision:VisionTower"})
DATA_SOURCES = Registry("nemo_bluelm.data_sources")
EXPORTERS = Registry("nemo_bluelm.exporters")
