"""Thinking budgets in vLLM, as a logits processor of its V1 engine.

``PYTHONPATH=DIR vllm serve DIR --trust-remote-code --logits-processors bluelm_thinking:ThinkingBudget``; a request asks
with ``vllm_xargs`` (in Python: ``SamplingParams(extra_args=...)``):

- ``think``: true: the reply begins with a thought; false: it has none; not given: the model decides.
- ``think_budget``: tokens of a thought at most; then it is closed. Not given: as many as leave an answer room.
- ``closing_text``: written at the end of a thought that the budget closes, and not counted in it.

A request with none of the three is left alone. The others can't write the prompt's own special tokens either, nor end
in the midst of a thought.
"""

from collections import deque
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

try:
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
except ImportError:  # `Reply` works without it
    AdapterLogitsProcessor = object

_KEYS = ("think", "think_budget", "closing_text")
_PROMPTS_OWN = ("<pad>", "<s>", "[|Human|]:", "[|AI|]:", "<im_start>", "<image>", "<im_end>", "[|BlueThink|]")


class Reply:
    """What may come next in one reply. Called with its tokens so far and the next token's logits [vocabulary].

    Args:
        max_tokens: of the reply; None: no end.

    Raises:
        ValueError: an option that makes no sense, or no room for a thought and an answer.
    """

    def __init__(self, think=None, think_budget=None, closing_text="", max_tokens=None):
        if think not in (True, False, None):
            raise ValueError(f"think is {think!r}; it must be true, false or null")
        whole = isinstance(think_budget, int) and not isinstance(think_budget, bool)
        if think_budget is not None and not (whole and think_budget >= 0):
            raise ValueError(f"think_budget is {think_budget!r}; it must be 0 or more")
        if not isinstance(closing_text, str):
            raise ValueError(f"closing_text is {closing_text!r}; it must be a text")
        tokenizer = _tokenizer()
        self._think, self._close, self._eos = map(tokenizer.token_to_id, ("<think>", "</think>", "</s>"))
        self._own = list(map(tokenizer.token_to_id, _PROMPTS_OWN))
        self._closing = [*tokenizer.encode(closing_text, add_special_tokens=False).ids, self._close]
        # <think>, the closing text, </think> and one token of the answer
        room = float("inf") if max_tokens is None else max_tokens - len(self._closing) - 2
        if think and room < 0:
            raise ValueError(
                f"max_tokens is {max_tokens}; a thought, its end and an answer need {max_tokens - room} at least"
            )
        self._limit = room if think_budget is None else min(room, think_budget)
        self._asked = think
        self._restart()

    def _restart(self):
        self._forced = deque([self._think] if self._asked else [])
        self._read, self._thought = 0, 0
        self._thinking, self._after_thought = None, False  # thinking is None before the first token

    def __call__(self, tokens, logits):
        if len(tokens) < self._read:
            self._restart()
        for token in tokens[self._read :]:
            self._add(token)
        self._read = len(tokens)
        if self._forced:
            logits = torch.full_like(logits, -torch.inf)
            logits[self._forced[0]] = 0.0
        else:
            logits[self._banned()] = -torch.inf
        return logits

    def _add(self, token):
        forced = bool(self._forced)
        if forced:
            self._forced.popleft()
        if self._thinking is None and token == self._think:
            self._thinking = True
        elif self._thinking and token == self._close:
            self._thinking, self._after_thought = False, True
        elif self._thinking:
            self._thought += not forced
        else:
            self._thinking, self._after_thought = False, False
        if self._thinking and not self._forced and self._thought >= self._limit:
            self._forced.extend(self._closing)

    def _banned(self):
        if self._thinking is None:
            may_think = self._asked is None and self._limit >= 0
            return [*self._own, self._close, *([] if may_think else [self._think])]
        if self._thinking:
            return [*self._own, self._think, self._eos]
        return [*self._own, self._think, self._close, *([self._eos] if self._after_thought else [])]


class ThinkingBudget(AdapterLogitsProcessor):
    @classmethod
    def validate_params(cls, sampling_params):
        _reply(sampling_params)

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        return _reply(params)


def _reply(params):
    options = {key: value for key, value in (params.extra_args or {}).items() if key in _KEYS}
    return Reply(**options, max_tokens=params.max_tokens) if options else None


@lru_cache(maxsize=1)
def _tokenizer():
    tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
    tokenizer.encode_special_tokens = True  # a closing text can't forge special tokens
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
