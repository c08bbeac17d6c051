"""Replies in the shape of OpenAI's API, whole or as chunks; thoughts are ``reasoning_content``, as other servers do."""

import json
import time
import uuid
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.generate.request import Piece, Reply
from nemo_bluelm.serve.schema import Asked

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


def completion(asked: Asked, replies: Sequence[Reply], model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of an answer that isn't streamed."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.answer, "reasoning_content": reply.thought},
            "logprobs": _logprobs(reply, tokenizer) if asked.logprobs else None,
            "finish_reason": _finish_reason(reply),
        }
        for index, reply in enumerate(replies)
    ]
    return {**_head("chat.completion", model), "choices": choices, "usage": _usage(replies)}


class Chunks:
    """Server-sent events of one request; log-probabilities come with the last chunk of each reply."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer):
        self._asked, self._tokenizer = asked, tokenizer
        self._head = _head("chat.completion.chunk", model)
        self._replies: list[Reply] = []

    @property
    def complete(self) -> bool:
        """Whether every reply has ended."""
        return len(self._replies) == self._asked.sampling.samples

    def begin(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, delta) for index in range(self._asked.sampling.samples))

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """A chunk for all that is new of a thought or an answer, and one for each end of a reply."""
        events = []
        of_one_reply = sorted(pieces, key=lambda piece: piece.index)
        for (index, thinking), run in groupby(of_one_reply, key=lambda piece: (piece.index, piece.thinking)):
            run = list(run)
            if text := "".join(piece.text for piece in run):
                events.append(self._chunk(index, {"reasoning_content" if thinking else "content": text}))
            if (reply := run[-1].reply) is not None:
                self._replies.append(reply)
                logprobs = _logprobs(reply, self._tokenizer) if self._asked.logprobs else None
                events.append(self._chunk(index, {}, _finish_reason(reply), logprobs))
        return b"".join(events)

    def end(self) -> bytes:
        usage = _event({**self._head, "choices": [], "usage": _usage(self._replies)}) if self._asked.usage else b""
        return usage + b"data: [DONE]\n\n"

    @staticmethod
    def error(body: dict) -> bytes:
        """The last event of a stream that failed after its begin."""
        return _event(body)

    def _chunk(self, index: int, delta: dict, finish_reason: str | None = None, logprobs: dict | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event({**self._head, "choices": [choice]})


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _finish_reason(reply: Reply) -> str:
    return "length" if reply.stop_reason == "length" else "stop"


def _usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Of all replies to one prompt; their tokens are all that were written, special ones too."""
    prompt, new = replies[0].prompt_tokens, sum(len(reply.tokens) for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {"reasoning_tokens": sum(reply.thinking_tokens for reply in replies)},
    }


def _logprobs(reply: Reply, tokenizer: Tokenizer) -> dict[str, list]:
    """The answer's tokens as ``content``, the thought's as ``reasoning_content``; tags and ``</s>`` are in neither."""
    lists: dict[str, list] = {"content": [], "reasoning_content": []}
    where = "content" if reply.thought is None else "reasoning_content"
    for token, logprob in zip(reply.tokens, reply.logprobs):
        if reply.thought is not None and token in (tokenizer.think, tokenizer.think_end):
            where = "content" if token == tokenizer.think_end else where
        elif token != tokenizer.eos:
            lists[where].append(_token(tokenizer.decode([token]), logprob))
    return lists


def _token(text: str, logprob: float) -> dict[str, Any]:
    whole = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text of its own
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": whole, "top_logprobs": []}
