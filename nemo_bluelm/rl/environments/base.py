"""What rewards are made of: an episode goes in, a reward comes out, or the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Union

from nemo_bluelm.data.chat import Message
from nemo_bluelm.evaluate.scorers.base import Score, Scorer

if TYPE_CHECKING:  # it imports torch, which a reward's process can do without
    from nemo_bluelm.generate.request import Reply

_THOUGHT_END = "</think>"


@dataclass(frozen=True)
class Said:
    """Of a ``Reply`` what rewards read."""

    thought: Optional[str]
    answer: str
    finished: bool = True
    stop_reason: str = "eos"
    thinking_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Episode:
    """A reply, and the record that it replies to.

    Attributes:
        task_name: of the environment.
        fields: of the record.
        think: whether a thought was asked for; None: it was left to the model.
        messages: the prompt, up to the user's last turn; only for rewards that ask for it by ``reads_prompts``.
        images: of the prompt, as their files have them; likewise.
    """

    task_name: str
    fields: Mapping[str, Any]
    reply: Union["Reply", Said]
    think: Optional[bool] = None
    messages: Sequence[Message] = ()
    images: tuple[bytes, ...] = ()

    def light(self) -> "Episode":
        """The same without tokens, for a reward's process."""
        said = {item.name: getattr(self.reply, item.name) for item in fields(Said)}
        return replace(self, reply=Said(**said))

    @property
    def answer(self) -> str:
        """What comes after the last thought, in an answer that has marks of thoughts too."""
        return self.reply.answer.rpartition(_THOUGHT_END)[2]

    @property
    def truncated(self) -> bool:
        """Whether it reached its length before its answer ended."""
        return self.reply.stop_reason == "length" and not self.reply.finished


@dataclass(frozen=True)
class Reward:
    """What a reply is worth to training.

    Attributes:
        value: in the environment's ``reward_range``; None: nobody can tell, and the reply belongs to no baseline.
        components: from 0 to 1 by the names of the environment's rewards, None where nobody can tell.
        reason: why something is None, or what was wrong with the reply.
        correct: by the heaviest of the rewards; None where nobody can tell.
        timed_out, failed, truncated: a time limit was reached; a reward or its process raised an error; the reply was
            cut at its length.
        masked: it has no value because it was cut.
        seconds: that it took.
    """

    value: Optional[float]
    components: Mapping[str, Optional[float]] = field(default_factory=dict)
    reason: str = ""
    correct: Optional[bool] = None
    timed_out: bool = False
    failed: bool = False
    truncated: bool = False
    masked: bool = False
    seconds: float = 0.0


@dataclass
class RewardFunction:
    """One reward. The fields of a subclass are its options; ``register_reward`` gives it its name."""

    name: ClassVar[str] = ""
    reads_prompts: ClassVar[bool] = False  # whether it is given the prompt itself, with its images

    @property
    def module(self) -> str:
        """What a process imports to know this reward."""
        return type(self).__module__

    def check(self) -> None:
        """Look for mistakes before anything is generated.

        Raises:
            UserError: options that can't be, something that isn't installed.
        """

    def open(self) -> None:
        """Start what it needs, so that no reply waits for it. Called again after each reply."""

    def longest(self) -> float:
        """Seconds that its own limits allow a reply; 0: it has none."""
        return 0.0

    def score(self, episode: Episode) -> Score:
        """Score a reply, whatever it is."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it started."""


class ScorerReward(RewardFunction):
    """A scorer of evaluations as a reward: of the answer, by the record's fields."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self.open, self.close, self.longest = scorer.open, scorer.close, scorer.longest

    @property
    def module(self) -> str:
        return type(self._scorer).__module__

    def score(self, episode: Episode) -> Score:
        if not self._scorer.applies(episode.fields):
            return Score(None, f"the record lacks what it needs, such as its {self._scorer.reference}")
        return self._scorer.score(episode.answer, episode.fields)
