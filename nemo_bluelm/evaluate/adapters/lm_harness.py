"""lm-evaluation-harness: our checkpoints as its model ``bluelm``.

from lm_eval import simple_evaluate
with open_generator(checkpoint) as generator:
    simple_evaluate(HarnessModel(generator), tasks=["gsm8k"], apply_chat_template=True)
"""

import json
from collections.abc import Sequence
from typing import Any, Optional

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_bluelm.data.chat import Message, encode_prompt
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.likelihood import loglikelihoods
from nemo_bluelm.evaluate.modes import TOKENS_AT_ONCE, batches, prompt_length
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling

_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


class HarnessModel(LM):
    """A generator as the harness sees it.

    With the harness's chat template, and always for ``generate_until``, a context is a conversation; without it
    ``loglikelihood`` sees a plain document, as a base model does.

    Args:
        think: answer with a thought, which the harness doesn't see.
        think_budget: tokens of a thought at most, beside those of the answer; None: as many as of the answer.
        max_length: tokens of a window of ``loglikelihood_rolling``.
        max_gen_toks: of a reply, where the task doesn't say.
    """

    tokenizer_name = "bluelm"

    def __init__(
        self,
        generator: Generator,
        think: bool = False,
        think_budget: Optional[int] = None,
        max_length: int = 4096,
        max_gen_toks: int = 256,
        tokens_at_once: int = TOKENS_AT_ONCE,
    ):
        super().__init__()
        self._generator, self._think, self._budget = generator, think, think_budget
        self._max_length, self._max_gen_toks, self._tokens_at_once = max_length, max_gen_toks, tokens_at_once
        self._chats: dict[str, list[Message]] = {}

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The format is in the code, not in a template; this names it in the harness's caches."""
        return "bluelm"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A text that stands for the conversation; special tokens can't be typed, so the text can't be it.

        Raises:
            UserError: the harness wants the assistant's turn begun for it.
        """
        if not add_generation_prompt:
            raise UserError("a task that begins the assistant's turn (gen_prefix) can't be asked; leave it out")
        messages = _in_turns(chat_history)
        key = json.dumps(messages, ensure_ascii=False)
        self._chats[key] = messages
        return key

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        return loglikelihoods(self._generator, [self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        tokenizer = self._generator.tokenizer
        counts, pairs = [], []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                tokenizer.encode(text), prefix_token=tokenizer.bos, max_seq_len=self._max_length, context_len=1
            )
            some = [make_disjoint_window(window) for window in windows]
            counts.append(len(some))
            pairs += some
        found = iter(loglikelihoods(self._generator, pairs))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(number)
        for sampling, numbers in groups.items():
            prompts = [Prompt(self._messages(requests[number].args[0]), (), self._think) for number in numbers]
            lengths = [prompt_length(self._generator, prompt) for prompt in prompts]
            for some in batches(lengths, sampling.max_new_tokens, 1, self._tokens_at_once):
                for place, reply in zip(some, self._generator.generate([prompts[i] for i in some], sampling)):
                    answers[numbers[place]] = reply.answer
        return answers

    def _messages(self, context: str) -> list[Message]:
        return self._chats.get(context) or [{"role": "user", "content": context}]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        until = options.get("until") or []
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", given.get("temperature", 0) > 0):
            given["temperature"] = 0.0
        new, thought = int(options.get("max_gen_toks") or self._max_gen_toks), None
        if self._think:
            thought = new if self._budget is None else self._budget
        return Sampling(
            new if thought is None else new + thought + 2,  # <think> and </think>
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            think_budget=thought,
            **given,
        )

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; in a document the border between them is a token's, as the harness's own models have it."""
        tokenizer = self._generator.tokenizer
        if context in self._chats:
            tokens = encode_prompt(self._chats[context], tokenizer, (), False, self._generator.control_token)
            return tokens, tokenizer.encode(continuation)
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
        return [tokenizer.bos, *before], whole[len(before) :]


def _in_turns(history: list[dict[str, str]]) -> list[Message]:
    """The conversation with what a system says at the head of the user's first turn; our format has no such role."""
    messages: list[Message] = []
    for message in history:
        role = "user" if message["role"] == "system" else message["role"]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{message['content']}"
        else:
            messages.append({"role": role, "content": message["content"]})
    return messages
