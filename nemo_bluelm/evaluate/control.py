"""Does the model obey the control token: think when it stands in the query, and only then?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nemo_bluelm.data.records import Record
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Reply, Sampling


@dataclass(frozen=True)
class Mode:
    """Replies in one mode.

    Attributes:
        obeyed: share with a closed thought when asked for one, or without any thought when not.
        right: share of the answers that are the expected text.
        finished: share that ended by themselves and are well-formed.
        count: prompts.
    """

    obeyed: float
    right: float
    finished: float
    count: int


def control_obedience(
    generator: Generator,
    questions: Sequence[tuple[Record, Sequence[bytes]]],
    max_new_tokens: int = 96,
    prompts_at_once: int = 128,
) -> dict[str, Mode]:
    """Every question in both modes, greedy.

    Args:
        questions: conversations that end with the expected answer, and the bytes of their images.
        max_new_tokens: of a reply, thought and answer together.

    Returns:
        By mode: ``think`` with the control token, ``direct`` without.

    Raises:
        UserError: messages and images that don't go together, or an image that can't be decoded.
        ValueError: no question.
    """
    return {
        name: ask(generator, questions, think, max_new_tokens, prompts_at_once)
        for name, think in (("think", True), ("direct", False))
    }


def as_rows(modes: dict[str, Mode]) -> dict[str, dict]:
    """The result as plain values, for a report."""
    return {name: asdict(mode) for name, mode in modes.items()}


def ask(
    generator: Generator,
    questions: Sequence[tuple[Record, Sequence[bytes]]],
    think: bool,
    max_new_tokens: int = 96,
    prompts_at_once: int = 128,
) -> Mode:
    """Every question in one mode; arguments and errors as :func:`control_obedience`."""
    if not questions:
        raise ValueError("there is no question")
    prompts = [Prompt(record.messages[:-1], images, think) for record, images in questions]
    expected = [_text(record.messages[-1]["content"]) for record, _ in questions]
    replies: list[Reply] = []
    free = Sampling(max_new_tokens, enforce=False)  # what the model does by itself is what is asked
    for at in range(0, len(prompts), prompts_at_once):
        replies += generator.generate(prompts[at : at + prompts_at_once], free)
    count = len(replies)
    return Mode(
        obeyed=sum((reply.thought is not None and reply.finished) == think for reply in replies) / count
        if think
        else sum(reply.thought is None for reply in replies) / count,
        right=sum(reply.answer == answer for reply, answer in zip(replies, expected)) / count,
        finished=sum(reply.finished for reply in replies) / count,
        count=count,
    )


def _text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
