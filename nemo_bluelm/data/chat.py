"""The chat and document formats: to token ids and loss mask, one code path for training and generation.

    <s>[|Human|]:{query}[|BlueThink|]\\n[|AI|]:<think>{thought}</think>{answer}</s>    thinking
    <s>[|Human|]:{query}\\n[|AI|]:{answer}</s>                                         non-thinking
    <s>{text}{image}{text}</s>                                                         document

An image stands at its place as ``<im_start>``, one ``<image>`` per visual token, ``<im_end>``. The role
format is the vendor's; that the control token follows the query, and that there is no empty think block, is
what the BlueLM-2.5 report says; for comparison it can precede the query. Further turns follow the ``</s>`` of
the last one directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One document. ``loss_mask[i]`` says whether ``tokens[i]`` is a target; both lists have the same length."""

    tokens: list[int]
    loss_mask: list[bool]
    images: int = 0

    def __post_init__(self):
        if len(self.tokens) != len(self.loss_mask):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.loss_mask)} mask entries")


def encode_document(content: str | Sequence[dict], tokenizer: Tokenizer, image_tokens: Sequence[int] = ()) -> Encoded:
    """A pre-training document: plain text, or text and images in turns. Targets are text and ``</s>``, never images.

    Args:
        content: text, or parts as in :func:`encode_conversation`.
        image_tokens: visual tokens of each image, in the order of the image parts.

    Raises:
        UserError: malformed parts, or another number of images than image parts.
    """
    writer = _Writer(tokenizer, image_tokens)
    writer.document(content)
    return writer.finish()


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    image_tokens: Sequence[int],
    control_token: ControlToken = ControlToken.after_query,
) -> Encoded:
    """A training conversation; targets are the replies: thought with its tags, answer and ``</s>``.

    Args:
        messages: ``{"role": "user" | "assistant", "content": str | parts, "thinking": str}``, turns alternate, user
            first, assistant last. Parts are ``{"type": "text", "text": str}`` and ``{"type": "image"}``; images
            are for users, ``thinking`` (optional) for assistants.
        image_tokens: visual tokens of each image, in the order of the image parts.
        control_token: its place in the queries whose reply has a thought.

    Raises:
        UserError: messages that break these rules, or another number of images than image parts.
    """
    writer = _Writer(tokenizer, image_tokens, control_token)
    _check_roles(messages, last="assistant")
    for query, reply in zip(messages[::2], messages[1::2]):
        writer.query(query, think=reply.get("thinking") is not None)
        writer.reply(reply)
    return writer.finish()


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    image_tokens: Sequence[int],
    think: bool,
    control_token: ControlToken = ControlToken.after_query,
) -> list[int]:
    """A prompt to generate from: as :func:`encode_conversation`, but it ends right after the last ``[|AI|]:``.

    With ``think`` the last query has the control token, where ``control_token`` says; the model itself writes
    ``<think>``.

    Raises:
        UserError: as :func:`encode_conversation`, with a user's message last.
    """
    writer = _Writer(tokenizer, image_tokens, control_token)
    _check_roles(messages, last="user")
    for query, reply in zip(messages[:-1:2], messages[1::2]):
        writer.query(query, think=reply.get("thinking") is not None)
        writer.reply(reply)
    writer.query(messages[-1], think=think)
    return writer.finish().tokens


class _Writer:
    """Appends turns to one growing document."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_tokens: Sequence[int],
        control_token: ControlToken = ControlToken.after_query,
    ):
        self._control_token = control_token
        self._tokenizer = tokenizer
        self._image_tokens = image_tokens
        self._images = 0
        self._tokens = [tokenizer.bos]
        self._loss_mask = [False]

    def document(self, content: str | Sequence[dict]) -> None:
        self._content(_parts(content, "document", images=True), target=True)
        self._add([self._tokenizer.eos], target=True)

    def query(self, message: Message, think: bool) -> None:
        t = self._tokenizer
        self._add([t.human])
        if think and self._control_token == ControlToken.before_query:
            self._add([t.blue_think])
        self._content(_parts(message.get("content"), "user message", images=True), target=False)
        if think and self._control_token == ControlToken.after_query:
            self._add([t.blue_think])
        self._add([*t.newline, t.ai])

    def reply(self, message: Message) -> None:
        t = self._tokenizer
        thought = message.get("thinking")
        if thought is not None:
            self._add([t.think, *t.encode(thought), t.think_end], target=True)
        self._content(_parts(message.get("content"), "assistant message", images=False), target=True)
        self._add([t.eos], target=True)

    def finish(self) -> Encoded:
        if self._images != len(self._image_tokens):
            raise UserError(
                f"there are {self._images} image parts but {len(self._image_tokens)} images are supplied; "
                "give one image for each image part"
            )
        return Encoded(self._tokens, self._loss_mask, self._images)

    def _content(self, parts: Sequence[dict], target: bool) -> None:
        for part in parts:
            if part["type"] == "image":
                self._add(self._image())
            else:
                self._add(self._tokenizer.encode(part["text"]), target)

    def _image(self) -> list[int]:
        t, at = self._tokenizer, self._images
        self._images += 1
        count = self._image_tokens[at] if at < len(self._image_tokens) else 0  # finish() reports the missing one
        return [t.im_start, *[t.image] * count, t.im_end]

    def _add(self, ids: list[int], target: bool = False) -> None:
        self._tokens += ids
        self._loss_mask += [target] * len(ids)


def _check_roles(messages: Sequence[Message], last: str) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"messages is {messages!r:.60}; it must be a list with at least one message")
    for at, message in enumerate(messages):
        role = ("user", "assistant")[at % 2]
        if not isinstance(message, dict):
            raise UserError(f"messages[{at}] is {message!r:.60}; it must be an object with role and content")
        if message.get("role") != role:
            raise UserError(
                f"messages[{at}].role is {message.get('role')!r}; it must be {role!r}: user first, then in turns"
            )
        allowed = {"role", "content"} | ({"thinking"} if role == "assistant" else set())
        if unknown := sorted(set(message) - allowed):
            raise UserError(
                f"messages[{at}] has the unknown key {unknown[0]!r}; {role} messages may have {sorted(allowed)}"
            )
        thought = message.get("thinking")
        if thought is not None and (not isinstance(thought, str) or not thought):
            raise UserError(f"messages[{at}].thinking is {thought!r:.60}; it must be text, or leave the key out")
    if messages[-1]["role"] != last:
        raise UserError(f"the last message is the {messages[-1]['role']}'s; it must be the {last}'s")


def _parts(content: Any, where: str, images: bool) -> Sequence[dict]:
    """The content as a list of checked parts; ``where`` and ``images`` say whose it is and whether it may hold any."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise UserError(f"the content of a {where} is {content!r:.60}; it must be text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2:
            continue
        if kind == "image" and images and len(part) == 1:
            continue
        allowed = '{"type": "text", "text": ...}' + (' or {"type": "image"}' if images else "")
        raise UserError(f"a content part of a {where} is {part!r:.60}; it must be {allowed}")
    return content
