"""What an ablation can measure of a trained run: named measures with options, each giving numbers for a table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm.config.grpo import Objective
from nemo_bluelm.config.pipeline import check_keys
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.learning import entropies, rewards, tokens_seen, tokens_to
from nemo_bluelm.runtime.run_dir import resolve_checkpoint

# How a number is meant: a share of 1, a change relative to what was before, a loss, a number of tokens.
SHARE, CHANGE, NATS, TOKENS = "share", "change", "nats", "tokens"


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        before: run or checkpoint folder whose weights it started from.
        others: folders of all runs of the ablation by the names of their stages.
    """

    recipe: Recipe
    folder: Path
    before: Optional[Path]
    others: Mapping[str, Path]


@dataclass(frozen=True)
class Number:
    """A row of the table for one run; ``value`` is None where there is nothing to tell."""

    name: str
    value: Optional[float]
    unit: str


@dataclass(frozen=True)
class Measured:
    """Numbers for the table; ``drawn`` are those that the plot shows as bars, unless there is a ``curve`` to draw."""

    numbers: tuple[Number, ...]
    drawn: tuple[Number, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()


@dataclass
class Measure:
    """The fields of a subclass are its options. ``title`` stands over its plot; ``axes`` are a curve's.

    ``unit`` is that of what is drawn.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = SHARE
    axes: ClassVar[tuple[str, str]] = ("", "")

    def check_options(self) -> None:
        """Look for mistakes that no data is needed to find.

        Raises:
            UserError: options that can't be.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"{option.name} is {value}; it must be 1 or more")

    def check(self, run: Run) -> None:
        """Look for mistakes before anything is trained.

        Raises:
            UserError: data that isn't there.
        """

    def reads(self, run: Run) -> list[Path]:
        """Folders of the runs that the numbers come from."""
        return [run.folder]

    def measure(self, run: Run) -> Measured:
        """The numbers of a finished run."""
        raise NotImplementedError


@dataclass
class TextLoss(Measure):
    """Loss on held-out text after the stage, and its change by the stage: what became of the language."""

    name, title, unit = "text_loss", "Loss on held-out text, change by the stage", CHANGE
    shards: list[str] = field(default_factory=lambda: ["text-test.tar"])
    length: int = 512

    def check(self, run: Run) -> None:
        _texts(run, self.shards)

    def reads(self, run: Run) -> list[Path]:
        return [run.folder, *([run.before] if run.before else [])]

    def measure(self, run: Run) -> Measured:
        after = self._loss(run, run.folder)
        loss = Number("loss on held-out text", after, NATS)
        if run.before is None:
            return Measured((loss,))
        change = Number("its change by the stage", after / self._loss(run, run.before) - 1, CHANGE)
        return Measured((loss, change), drawn=(change,))

    def _loss(self, run: Run, folder: Path) -> float:
        from nemo_bluelm.evaluate.text_loss import text_loss

        texts = _texts(run, self.shards)
        with _generator(folder) as generator:
            return text_loss(generator, texts, self.length)


@dataclass
class PositionLoss(Measure):
    """Loss on held-out text by position: a model that can use a long context gets better along it."""

    name, title, unit, axes = "position_loss", "Loss on held-out text", NATS, ("position in tokens", "nats per token")
    shards: list[str] = field(default_factory=lambda: ["text-test.tar"])
    length: int = 4096
    spans: int = 4

    def check_options(self) -> None:
        super().check_options()
        if self.spans > self.length:
            raise UserError(f"spans is {self.spans}; it must be from 1 to length {self.length}")

    def check(self, run: Run) -> None:
        _texts(run, self.shards)

    def measure(self, run: Run) -> Measured:
        from nemo_bluelm.evaluate.text_loss import loss_by_position

        texts = _texts(run, self.shards)
        with _generator(run.folder) as generator:
            spans = loss_by_position(generator, texts, self.length, self.spans)
        numbers = (Number(f"held-out text, tokens {s.start:,} to {s.end:,}", s.loss, NATS) for s in spans)
        return Measured(tuple(numbers), curve=tuple(((s.start + s.end) / 2, s.loss) for s in spans))


@dataclass
class Questions(Measure):
    """Held-out questions, most of them about images, answered without thinking with exactly the expected text."""

    name, title = "questions", "Held-out questions about images, right"
    shards: list[str] = field(default_factory=lambda: ["digits-test.tar"])
    max_new_tokens: int = 16

    def check(self, run: Run) -> None:
        _questions(run, self.shards)

    def measure(self, run: Run) -> Measured:
        from nemo_bluelm.evaluate.control import ask

        with _generator(run.folder) as generator:
            found = ask(generator, _questions(run, self.shards), False, self.max_new_tokens)
        right = Number("questions about images, right", found.right, SHARE)
        return Measured((right,), drawn=(right,))


@dataclass
class Control(Measure):
    """Held-out problems in text, each with the control token and without: obedience and right answers."""

    name, title = "control", "Held-out problems, with the control token"
    shards: list[str] = field(default_factory=lambda: ["reasoning-test.tar"])
    count: int = 100
    max_new_tokens: int = 96

    def check(self, run: Run) -> None:
        self._problems(run)

    def measure(self, run: Run) -> Measured:
        from nemo_bluelm.evaluate.control import control_obedience

        with _generator(run.folder) as generator:
            modes = control_obedience(generator, self._problems(run), self.max_new_tokens)
        drawn = (
            Number("whole thought", modes["think"].obeyed, SHARE),
            Number("right answer", modes["think"].right, SHARE),
        )
        numbers = (
            Number("problems: whole thoughts with the token", modes["think"].obeyed, SHARE),
            Number("problems: right with the token", modes["think"].right, SHARE),
            Number("problems: at once without it", modes["direct"].obeyed, SHARE),
            Number("problems: right without it", modes["direct"].right, SHARE),
        )
        return Measured(numbers, drawn)

    def _problems(self, run: Run) -> list:
        found = [(record, images) for record, images in _questions(run, self.shards) if not images]
        if not found:
            raise UserError(f"every question in {', '.join(self.shards)} is about an image; name some in text")
        return found[: self.count]


@dataclass
class Activation(Measure):
    """Prompts of several kinds, most of them unlike the training data: does the control token start a thought?

    Attributes:
        shards: conversations in text whose first tag is their kind; empty for the packaged prompts.
    """

    name, title = "activation", "Prompts with the control token, thoughts"
    shards: list[str] = field(default_factory=list)
    max_new_tokens: int = 64

    def check(self, run: Run) -> None:
        for number, prompt in enumerate(self._prompts(run), 1):
            texts = [] if prompt.messages is None else [message.get("content") for message in prompt.messages]
            if len(texts) < 2 or not all(isinstance(text, str) for text in texts) or not prompt.tags:
                raise UserError(
                    f"prompt {prompt.id or number} of {', '.join(self.shards)} is no conversation in text with a tag "
                    "for its kind; add the tag, or leave the prompt out"
                )

    def measure(self, run: Run) -> Measured:
        from nemo_bluelm.evaluate.activation import activation

        with _generator(run.folder) as generator:
            found = activation(generator, self._prompts(run), self.max_new_tokens)
        rows = [
            *((f"{kind}: thinks with the token", of.activated, SHARE) for kind, of in found.items()),
            *((f"{kind}: thinks without it", of.unasked, SHARE) for kind, of in found.items()),
            *((f"{kind}: exact answers right", of.right, SHARE) for kind, of in found.items()),
            *((f"{kind}: log-likelihood", of.likelihood, NATS) for kind, of in found.items()),
        ]
        drawn = tuple(Number(kind, of.activated, SHARE) for kind, of in found.items())
        return Measured(tuple(Number(*row) for row in rows), drawn)

    def _prompts(self, run: Run) -> list:
        from nemo_bluelm.data.records import read_records
        from nemo_bluelm.evaluate.activation import PROMPTS

        if self.shards:
            return [record for record, _ in _records(run, self.shards)]
        return [record for _, record, _ in read_records(PROMPTS)]


@dataclass
class Needle(Measure):
    """Numbers found in documents by length of the document, mean over the depths."""

    name, title, axes = "needle", "Numbers found in documents", ("length of the document in tokens", "found")
    shards: list[str] = field(default_factory=lambda: ["text-test.tar"])
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    depths: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    count: int = 8

    def check_options(self) -> None:
        super().check_options()
        if not self.lengths or min(self.lengths) < 48:
            raise UserError(f"lengths is {self.lengths}; it must be one length or more, each of 48 tokens or more")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"depths is {self.depths}; it must be one depth or more, each from 0 to 1")

    def check(self, run: Run) -> None:
        _texts(run, self.shards)

    def measure(self, run: Run) -> Measured:
        from nemo_bluelm.evaluate.needle import found_by_length, needle_retrieval

        texts = _texts(run, self.shards)
        with _generator(run.folder) as generator:
            cells = needle_retrieval(generator, texts, self.lengths, self.depths, self.count)
        found = found_by_length(cells)
        numbers = (Number(f"numbers found in {length:,} tokens", share, SHARE) for length, share in found.items())
        return Measured(tuple(numbers), curve=tuple(found.items()))


@dataclass
class Learning(Measure):
    """Cross-entropy on the training data along the run, and the tokens that it took to a reference's.

    Attributes:
        reference: stage or variant whose last cross-entropy is the goal.
    """

    name, title, unit = "learning", "Cross-entropy in training", NATS
    axes = ("tokens", "nats per token")
    reference: Optional[str] = None

    def check(self, run: Run) -> None:
        if self.reference is not None and self.reference not in run.others:
            raise UserError(f"reference is {self.reference}; it must be one of {', '.join(run.others)}")

    def reads(self, run: Run) -> list[Path]:
        return [run.folder, *([run.others[self.reference]] if self.reference else [])]

    def measure(self, run: Run) -> Measured:
        losses = entropies(run.folder)
        numbers = [Number("cross-entropy in training, at the end", losses[-1], NATS)]
        if self.reference is not None:
            needed = tokens_to(run.folder, entropies(run.others[self.reference])[-1])
            numbers.append(Number(f"tokens to what {self.reference} has at the end", needed, TOKENS))
        return Measured(tuple(numbers), curve=tuple(zip(tokens_seen(run.folder), losses)))


@dataclass
class Rewards(Measure):
    """What replies were worth along a GRPO run, each variant's by its own rewards."""

    name, title, axes = "rewards", "Rewards in training", ("optimizer step", "mean reward")

    def check(self, run: Run) -> None:
        if run.recipe.objective is not Objective.grpo:
            raise UserError(f"objective is {run.recipe.objective.value}; only grpo has rewards")

    def measure(self, run: Run) -> Measured:
        found = rewards(run.folder)
        numbers = (Number("reward in training, at the end", found[-1], SHARE),) if found else ()
        return Measured(numbers, curve=tuple(enumerate(found, 1)))


MEASURES = {m.name: m for m in (TextLoss, PositionLoss, Questions, Control, Activation, Needle, Learning, Rewards)}


def make_measures(entries: Mapping[str, Any], where: str) -> list[Measure]:
    """Measures from a file's ``measures``.

    Args:
        entries: options, or None for none, by the measure's name.

    Raises:
        UserError: naming ``where``, the measure and the option.
    """
    check_keys(entries, tuple(MEASURES), f"{where}: measures", "measures")
    made = []
    for name, options in entries.items():
        place = f"{where}: measure {name}"
        schema = OmegaConf.structured(MEASURES[name])
        check_keys(options or {}, tuple(schema), place, name)
        try:
            made.append(OmegaConf.to_object(OmegaConf.merge(schema, options or {})))
            made[-1].check_options()
        except OmegaConfBaseException as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]}") from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return made


def _texts(run: Run, shards: list[str]) -> list[str]:
    texts = [record.text for record, _ in _records(run, shards) if record.text]
    if not texts:
        raise UserError(f"{', '.join(shards)} has no plain text; name shards that do")
    return texts


def _questions(run: Run, shards: list[str]) -> list[tuple[Any, list[bytes]]]:
    found = [(record, images) for record, images in _records(run, shards) if record.messages]
    if not found:
        raise UserError(f"{', '.join(shards)} has no conversation; name shards that do")
    return found


def _records(run: Run, patterns: list[str]) -> list[tuple[Any, list[bytes]]]:
    """Records and image bytes of the shards, which are named as a source's are."""
    from nemo_bluelm.data.files import expand, join
    from nemo_bluelm.data.records import read_records

    root = run.recipe.data.root
    try:
        shards = [join(root, shard) for shard in expand(root, patterns)]
    except UserError as error:
        raise UserError(f"shards: {error}") from error
    return [(record, images) for shard in shards for _, record, images in read_records(shard)]


@contextmanager
def _generator(folder: Path) -> Iterator[Any]:
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(resolve_checkpoint(str(folder), "run_dir")) as generator:
        yield generator
