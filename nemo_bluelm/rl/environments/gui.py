"""Actions on a screen: what is done, and where or with what."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.evaluate.scorers.box import Point
from nemo_bluelm.rl.environments.base import Episode, RewardFunction
from nemo_bluelm.rl.environments.registry import register_reward

_ALIASES = {
    **{"tap": "click", "left_click": "click", "touch": "click", "longpress": "long_press", "long_click": "long_press"},
    **{"input": "type", "input_text": "type", "type_text": "type", "text": "type", "write": "type"},
    **{"swipe": "scroll", "press_key": "press", "hotkey": "press", "key": "press", "open_app": "open"},
    **{"finish": "done", "finished": "done", "complete": "done", "terminate": "done", "stop": "done"},
    **{"go_back": "back", "press_back": "back", "press_home": "home", "double_tap": "double_click"},
}
_PLACES = ("point", "coordinate", "coordinates", "position", "box", "start_box", "bbox")
_WORDS = ("text", "value", "content", "direction", "key", "keys", "app", "app_name", "name", "button", "answer")
_CALL = re.compile(r"\A([A-Za-z_]\w{0,40})[ \t]{0,4}\((.{0,4000})\)\Z", re.DOTALL)
_QUOTED = re.compile(r"'([^']{0,2000})'|\"([^\"]{0,2000})\"")
_FENCE = re.compile(r"\A```\w{0,10}\n(.{0,10000}?)\n?```\Z", re.DOTALL)
_NAMES = re.compile(r"\b[A-Za-z]\w{0,20}\s{0,4}=\s{0,4}")  # of arguments
_PLACE = re.compile(r"\A[\d\s.,()\[\]-]{3,100}\Z")  # nothing but numbers
_LINE = re.compile(r"\A(?:action|动作)\s{0,4}[:：]\s{0,4}", re.IGNORECASE)


@dataclass(frozen=True)
class Action:
    """
    Attributes:
        kind: such as click, type, scroll.
        place: a point or box, as text.
        words: what is typed, the direction, the key, the application.
    """

    kind: str
    place: str = ""
    words: str = ""


@register_reward("gui")
@dataclass
class Gui(RewardFunction):
    """An action: the share ``type_share`` for the right type, all for its right place and words too.

    The answer is one action: JSON such as {"action": "click", "point": [x, y]}, or a call such as click(x, y) or
    type('text'), in a fence or after "Action:" too. The reference is a mapping such as
    {"type": "click", "box": [x1, y1, x2, y2]}, {"type": "type", "text": ...} or one with both, which count both.

    Attributes:
        reference: field with the right action.
        type_share: from 0 to 1.
        scale: coordinates are from 0 to it; None: pixels.
        aliases: names of actions beside the usual ones, and what they mean.
    """

    reference: str = "action"
    type_share: float = 0.2
    scale: Optional[float] = None
    aliases: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        if not 0 <= self.type_share < 1:
            raise UserError(f"type_share is {self.type_share}; it must be 0 or more and less than 1")
        Point(scale=self.scale).check()

    def score(self, episode: Episode) -> Score:
        wanted = episode.fields.get(self.reference)
        if not isinstance(wanted, Mapping) or not isinstance(wanted.get("type"), str):
            return Score(None, f"the record's {self.reference} is {wanted!r:.60}, not an action with a type")
        said = self._action(episode.answer)
        if said is None:
            return Score(0.0, "it states no action, or more than one")
        if said.kind != self._kind(wanted["type"]):
            return Score(0.0, f"the action is {said.kind!r:.40}")
        if "box" in wanted:
            found = Point(scale=self.scale).score(said.place, wanted)
            if found.value != 1:
                return found if found.value is None else Score(self.type_share, found.reason or "beside the box")
        words = _first(wanted, _WORDS)
        if words is not None and _plain(str(words)) and _plain(said.words) != _plain(str(words)):
            return Score(self.type_share, "other words")
        return Score(1.0)

    def _kind(self, name: str) -> str:
        plain = re.sub(r"[\s-]", "_", name.strip().lower())
        return {**_ALIASES, **self.aliases}.get(plain, plain)

    def _action(self, answer: str) -> Optional[Action]:
        text = _LINE.sub("", answer.strip())
        fenced = _FENCE.match(text)
        text = fenced[1].strip() if fenced else text
        return self._of_json(text) if text.startswith(("{", "[")) else self._of_call(text)

    def _of_json(self, text: str) -> Optional[Action]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        if not isinstance(found, dict):
            return None
        kind = next((found[name] for name in ("action", "type", "action_type") if name in found), None)
        if isinstance(kind, dict):  # {"action": {"type": ...}}
            found, kind = kind, kind.get("type")
        if not isinstance(kind, str):
            return None
        place = _first(found, _PLACES)
        if place is None and "x" in found and "y" in found:
            place = [found["x"], found["y"]]
        while isinstance(place, list) and len(place) == 1:
            place = place[0]
        words = _first(found, _WORDS)
        return Action(self._kind(kind), _bracketed(place), "" if words is None else str(words))

    def _of_call(self, text: str) -> Optional[Action]:
        call = _CALL.match(text)
        if call is None:
            plain = re.fullmatch(r"[A-Za-z_ ]{1,40}", text)
            return Action(self._kind(text)) if plain else None
        inside = _NAMES.sub("", call[2]).strip()
        if re.search(r"\)\s{0,40}[;\n]", _QUOTED.sub("", inside)):  # a second call
            return None
        quoted = [match[1] if match[1] is not None else match[2] for match in _QUOTED.finditer(inside)]
        unquoted = _QUOTED.sub("", inside).strip(" ,")
        if re.search(r"\d", unquoted):
            place = unquoted
        else:  # a place may be quoted; words beside it are then quoted too
            place = next((text for text in quoted if _PLACE.match(text)), "")
        words = [text for text in quoted if text != place or len(quoted) == 1] or [inside]
        return Action(self._kind(call[1]), _bracketed(place), words[0])


def _first(mapping: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What the mapping has for the first of the names that it has anything for."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _bracketed(place: Any) -> str:
    """A point or box as scorers of places read it."""
    text = "" if place is None else str(place)
    return text if any(mark in text for mark in "[(") else f"[{text}]"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
