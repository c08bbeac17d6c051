"""A request of ``/v1/chat/completions``, checked whole before it waits for the model.

Fields are OpenAI's, and ``top_k``, ``repetition_penalty``, ``think`` (true, false, null: the model decides) and
``think_budget`` (tokens). A field that would change nothing here is refused unless it has the value that means so.
"""

import json
from dataclasses import dataclass
from typing import Any

from nemo_bluelm.data.chat import Message, encode_prompt
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.request import Prompt, Sampling
from nemo_bluelm.generate.writer import Writer
from nemo_bluelm.serve.errors import ApiError, bad_request
from nemo_bluelm.serve.images import image_tokens, read_image
from nemo_bluelm.serve.settings import Served, Settings

# The values of OpenAI's fields that ask for nothing; null always does.
_NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
_LABELS = {"user", "metadata"}  # for OpenAI's bookkeeping
_READ = {
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "seed", "stop"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "think", "think_budget", "logprobs"),
}
_MESSAGE = {"role", "content", "reasoning_content"}
_STOPS, _STOP_LENGTH = 16, 256  # texts; characters of one
_LONGEST = 128  # characters of a token, more than any prompt has on average
_HUGE = 1e300  # no setting is a number like that


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        seed: None lets the server draw one; ``sampling`` has none of its own.
        tokens: of the prompt.
        usage: whether a stream ends with the usage.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int | None
    tokens: int
    stream: bool
    usage: bool
    logprobs: bool

    @property
    def alone(self) -> bool:
        """A reply with a seed depends on its place in the batch."""
        return self.seed is not None and self.sampling.temperature > 0


def read_chat(body: bytes | bytearray, served: Served, settings: Settings) -> Asked:
    """The request in a body.

    Raises:
        ApiError: it can't be answered; the message names the field and the way out.
    """
    fields = _fields(body)
    if (model := fields.get("model")) not in (None, served.name):
        raise ApiError(404, f"model is {model!r:.60}; this server has {served.name!r}", "model_not_found")
    messages, images = _messages(fields.get("messages"), served, settings)
    think = _flag(fields, "think", None)
    try:
        counts = [image_tokens(data, where, served.geometry, settings) for where, data in images.items()]
        prompt = encode_prompt(messages, served.tokenizer, counts, bool(think), served.control_token)
        sampling = _sampling(fields, len(prompt), served.context, settings)
        Writer(think, sampling, served.tokenizer, prompt, 0)  # refuses what leaves no room for an answer
        cells = sampling.samples * (len(prompt) + sampling.max_new_tokens)
        if cells > settings.max_batch_tokens:
            raise bad_request(
                f"prompt and new tokens of {sampling.samples} replies are {cells:,} tokens, the server has room for "
                f"{settings.max_batch_tokens:,}; ask for fewer or shorter ones",
                "context_length_exceeded",
            )
        for where, data in images.items():  # a header tells nothing of broken pixels, which would end a whole batch
            load_tiles(data, served.geometry, where, "torch")  # the same are good for all backends; the fastest
    except UserError as error:
        raise bad_request(str(error).replace("max_new_tokens", "max_tokens")) from None
    options = {} if fields.get("stream_options") is None else fields["stream_options"]
    if fields.get("stream_options") is not None and not fields.get("stream"):
        raise bad_request("stream_options changes nothing without stream; leave it out")
    if think is False and fields.get("think_budget") is not None:
        raise bad_request("think_budget changes nothing where think is false; leave one of them out")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise bad_request(f'stream_options is {options!r:.60}; it must be {{"include_usage": true or false}}')
    return Asked(
        Prompt(messages, tuple(images.values()), think),
        sampling,
        _whole(fields, "seed", None, -(2**63), 2**63 - 1),
        len(prompt),
        _flag(fields, "stream", False),
        _flag(options, "include_usage", False),
        _flag(fields, "logprobs", False),
    )


def _fields(body: bytes | bytearray) -> dict[str, Any]:
    def no_number(text: str):
        raise ValueError(f"{text} is no JSON")

    try:
        fields = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise bad_request(f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object with messages", "invalid_json")
    for name, value in fields.items():
        if name in _READ | _LABELS or value is None:
            continue
        if name not in _NEUTRAL:
            raise bad_request(f"unknown field {name!r:.60}; leave it out", "unknown_field")
        if not any(value == neutral for neutral in _NEUTRAL[name]):
            raise bad_request(f"{name} is {value!r:.60}, which this server can't do; leave it out", "unsupported_field")
    return fields


def _messages(given: Any, served: Served, settings: Settings) -> tuple[list[Message], dict[str, bytes]]:
    """The messages in the form of :mod:`nemo_bluelm.data.chat`, and the image files by the place they stand at."""
    if not isinstance(given, list) or not given:
        raise bad_request("messages must be a list with at least one message")
    messages: list[Message] = []
    images: dict[str, bytes] = {}
    characters = 0
    for at, message in enumerate(given):
        if not isinstance(message, dict):
            raise bad_request(f"messages[{at}] must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise bad_request(
                f"messages[{at}].role is {role!r:.40}; this model's chat has 'user' and 'assistant' only, put "
                "instructions into the first user message"
            )
        if isinstance(content, list):
            content = [_part(part, f"messages[{at}].content[{i}]", images, settings) for i, part in enumerate(content)]
            characters += sum(len(part.get("text", "")) for part in content)
        elif isinstance(content, str):
            characters += len(content)
        kept = {"role": role, "content": content}
        if message.get("reasoning_content"):
            kept["thinking"] = message["reasoning_content"]
            characters += len(str(kept["thinking"]))
        unknown = [key for key, value in message.items() if value is not None and key not in _MESSAGE]
        if unknown:
            raise bad_request(f"messages[{at}] has the unknown key {unknown[0]!r:.60}; leave it out", "unknown_field")
        messages.append(kept)
    if characters > _LONGEST * served.context:
        raise _too_long(f"at least {characters // _LONGEST:,} tokens", served.context)
    return messages, images


def _part(part: Any, where: str, images: dict[str, bytes], settings: Settings) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2:
        return part
    if kind == "image_url" and len(part) == 2 and "image_url" in part:
        if len(images) == settings.max_images:
            raise bad_request(f"more than {settings.max_images} images; send fewer", "too_many_images")
        images[where] = read_image(part["image_url"], where, settings)
        return {"type": "image"}
    raise bad_request(f'{where} must be {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": ...}}')


def _sampling(fields: dict, prompt: int, context: int, settings: Settings) -> Sampling:
    """How to write replies to a prompt of ``prompt`` tokens. Raises UserError too."""
    if fields.get("max_completion_tokens") is not None and fields.get("max_tokens") is not None:
        raise bad_request("max_tokens and max_completion_tokens are names of one limit; give one of them")
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    asked = _whole(fields, name, None, 1)
    if prompt + (asked or 1) > context:
        raise _too_long(f"{prompt:,} tokens and the reply {asked or 1:,}", context)
    stop = () if fields.get("stop") is None else fields["stop"]
    stop = (stop,) if isinstance(stop, str) else stop
    of_texts = isinstance(stop, (list, tuple)) and all(isinstance(text, str) for text in stop)
    if not of_texts or len(stop) > _STOPS or not all(0 < len(text) <= _STOP_LENGTH for text in stop):
        raise bad_request(f"stop must be a text or a list of up to {_STOPS} texts of 1 to {_STOP_LENGTH} characters")
    return Sampling(
        max_new_tokens=asked or min(context - prompt, settings.max_tokens),
        temperature=_number(fields, "temperature", 1.0),
        top_p=_number(fields, "top_p", 1.0),
        top_k=_whole(fields, "top_k", 0, 0),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0),
        think_budget=_whole(fields, "think_budget", None, 0),
        stop=tuple(stop),
        samples=_whole(fields, "n", 1, 1, settings.max_batch),
    )


def _too_long(what: str, context: int) -> ApiError:
    message = f"the prompt has {what}, the context {context:,}; shorten messages, scale images down or lower max_tokens"
    return bad_request(message, "context_length_exceeded")


def _number(fields: dict, name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _HUGE:
        raise bad_request(f"{name} is {value!r:.40}; it must be a number")
    return float(value)


def _whole(fields: dict, name: str, default: int | None, least: int, most: int = 2**31 - 1) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise bad_request(f"{name} is {value!r:.40}; it must be a whole number from {least} to {most}")
    return value


def _flag(fields: dict, name: str, default: bool | None) -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name} is {value!r:.40}; it must be true or false")
    return default if value is None else value
