"""A chat with a checkpoint on a terminal, and how a reply is shown as it comes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bluelm.data.headers import BadImage, read_header
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.request import Piece, Prompt, Reply, Sampling

if TYPE_CHECKING:
    from nemo_bluelm.generate.generator import Generator

HELP = "/image FILE  /think on|off|auto  /budget N|none  /reset  /quit; Ctrl-C ends an answer, Ctrl-D the chat"
_MODES = {"on": True, "off": False, "auto": None}
# What a model writes must not steer the terminal.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def read_image(path: str) -> bytes:
    """The bytes of an image file, whose header is looked at. Raises UserError."""
    try:
        data = Path(path).read_bytes()
        read_header(data)
    except OSError as error:
        raise UserError(f"image {path} can't be read: {error.strerror}; give the path of an image file") from error
    except BadImage as error:
        raise UserError(f"image {path}: {error}") from error
    return data


class Printer:
    """Shows replies: on a terminal the thought dim, then the answer; elsewhere the answer, as it is.

    Args:
        show_thought: print the thought elsewhere too.
        context: tokens that the model was trained for.

    Attributes:
        answer: what was shown of the last answer.
    """

    def __init__(self, show_thought: bool, context: int):
        self._terminal, self._context = sys.stdout.isatty(), context
        self._show_thought = show_thought or self._terminal
        self.answer = ""

    def show(self, pieces: Iterator[Piece]) -> Reply:
        """Print one reply to the end, then a line about it on stderr."""
        start, first, thought, reply = time.perf_counter(), None, False, None
        self.answer = ""
        try:
            for piece in pieces:
                first = first or time.perf_counter() - start
                if piece.thinking and self._show_thought and piece.text:
                    thought = True
                    self._write(piece.text, dim=True)
                elif piece.text and not piece.thinking:
                    self._write("\n\n" if thought and not self.answer else "")
                    self._write(piece.text)
                    self.answer += piece.text
                reply = piece.reply or reply
        finally:
            if first is not None:
                self._write("\n")
        self._tell(reply, first, time.perf_counter() - start)
        return reply

    def _write(self, text: str, dim: bool = False) -> None:
        if self._terminal:
            text = text.translate(_HARMLESS)
            text = f"\033[2m{text}\033[22m" if dim else text
        print(text, end="", flush=True)

    def _tell(self, reply: Reply, first: float, seconds: float) -> None:
        end = "" if reply.finished else ", cut off by --max-new-tokens"
        print(
            f"{reply.thinking_tokens} tokens thinking, {reply.answer_tokens} answering{end}; "
            f"first after {first:.2f} s, {len(reply.tokens) / seconds:.1f} tokens/s",
            file=sys.stderr,
        )
        if (total := reply.prompt_tokens + len(reply.tokens)) > self._context:
            print(f"Note: {total:,} tokens in all, the model was trained on {self._context:,}", file=sys.stderr)


class Chat:
    """Turns with one model; each is asked with all that was said before.

    Args:
        images: files of the first turn.
    """

    def __init__(
        self, generator: "Generator", sampling: Sampling, think: bool | None, printer: Printer, images: list[bytes]
    ):
        self._generator, self._sampling, self._think, self._printer = generator, sampling, think, printer
        self._messages: list[dict] = []
        self._images: list[bytes] = []
        self._new_images = images

    def run(self, read: Callable[[str], str]) -> None:
        """Until ``/quit``, the end of input or Ctrl-C between two answers.

        Args:
            read: as ``input``.
        """
        print(HELP, file=sys.stderr)
        while True:
            try:
                line = read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.partition(" ")[::2])
                elif line:
                    self._turn(line)
            except UserError as error:
                print(error, file=sys.stderr)

    def _command(self, name: str, value: str) -> None:
        value = value.strip()
        if name == "/image" and value:
            self._new_images.append(read_image(value))
        elif name == "/think" and value in _MODES:
            self._think = _MODES[value]
        elif name == "/budget" and (value == "none" or value.isdecimal()):
            self._sampling = replace(self._sampling, think_budget=None if value == "none" else int(value))
        elif name == "/reset" and not value:
            self._messages, self._images, self._new_images = [], [], []
        else:
            raise UserError(f"{name} {value}: no such command; {HELP}")

    def _turn(self, text: str) -> None:
        """One question; what it adds to the chat is forgotten if nothing is answered."""
        content = [*({"type": "image"} for _ in self._new_images), {"type": "text", "text": text}]
        messages = [*self._messages, {"role": "user", "content": content}]
        images = [*self._images, *self._new_images]
        stream = self._generator.stream([Prompt(messages, images, self._think)], self._sampling)
        answer = {"role": "assistant"}
        try:
            with closing(stream):
                reply = self._printer.show(stream)
            if reply.thought:
                answer["thinking"] = reply.thought
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        except UserError:
            self._new_images = []
            raise
        if self._printer.answer:
            self._messages = [*messages, {**answer, "content": self._printer.answer}]
            self._images, self._new_images = images, []
