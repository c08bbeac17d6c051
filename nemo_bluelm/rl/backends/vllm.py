"""Replies by a vLLM server: a process with GPUs of its own, which gets the policy's weights as a folder of Hugging
Face's and is asked over HTTP."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from nemo_bluelm.config.compose import to_yaml
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.data.chat import Message
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Reply, Sampling, TokenPrompt
from nemo_bluelm.generate.writer import Writer
from nemo_bluelm.rl.backends.base import InferenceBackendBase, OnReply
from nemo_bluelm.rl.backends.mcore import whole_weights
from nemo_bluelm.rl.backends.vllm_server import VllmServer
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR
from nemo_bluelm.runtime.single import STATE_PREFIX
from nemo_bluelm.runtime.storage import save_weights


class VllmBackend(InferenceBackendBase):
    """
    A reply is what our generator would have written of the same draws: the folder's logits processor holds thinking
    budgets, and the tokens that it wrote are marked.

    Args:
        generator: on the policy's module.
        chunks: the policy's DistributedDataParallel modules.
        recipe: of the run; ``grpo.generation.vllm`` says where the server is and which folder it was started on.

    Raises:
        UserError: the folder is no export of vLLM's, or the server doesn't answer.
    """

    def __init__(self, generator: Generator, chunks: Sequence[torch.nn.Module], recipe: Recipe):
        self._generator, self._chunks, self._recipe = generator, chunks, recipe
        keys = recipe.grpo.generation.vllm
        self._folder = Path(keys.folder).absolute()
        self._server = VllmServer(keys.url, keys.timeout)
        self._asks = parallel_state.get_tensor_model_parallel_rank() == 0
        _on_first_rank(self._check)

    def _check(self) -> None:
        if not (self._folder / "bluelm_thinking.py").exists():
            raise UserError(
                f"grpo.generation.vllm.folder is {self._folder}, which is no export for vLLM; make it with "
                f"'nemo-bluelm export vllm {self._recipe.init_from} {self._folder}', and start vLLM on it"
            )
        self._server.connect()

    def refit(self) -> None:
        """
        Raises:
            UserError: the folder can't be written, or the server doesn't load it.
        """
        place = self._folder.with_name(f".{self._folder.name}.refit")
        _on_first_rank(lambda: _make_checkpoint(place, self._recipe, self._generator.tokenizer.content))
        with whole_weights(self._chunks):
            model = unwrap_model(self._generator.model)
            save_weights(model.sharded_state_dict(prefix=STATE_PREFIX), place / WEIGHTS_DIR)
        torch.distributed.barrier()
        _on_first_rank(lambda: self._hand_over(place))

    def _hand_over(self, checkpoint: Path) -> None:
        from nemo_bluelm.convert.exporting import export_hf

        export_hf(checkpoint, checkpoint / "hf")
        self._check_config(checkpoint / "hf" / "config.json")
        for file in sorted((checkpoint / "hf").glob("model*.safetensors*")):
            os.replace(file, self._folder / file.name)
        (self._folder / "golden.json").unlink(missing_ok=True)  # of the weights before
        shutil.rmtree(checkpoint)
        self._server.reload()

    def _check_config(self, policy: Path) -> None:
        """The server keeps the configuration that it was started with."""
        mine, its = (_flat(json.loads(path.read_text())) for path in (policy, self._folder / "config.json"))
        for key in sorted(set(mine) | set(its)):
            if mine.get(key) != its.get(key):
                raise UserError(
                    f"{key} is {its.get(key)} in {self._folder / 'config.json'}, which vLLM was started on, and "
                    f"{mine.get(key)} in this recipe's model; make the model that of init_from, or export again from a "
                    "checkpoint of this recipe"
                )

    def generate(self, prompts: Sequence[TokenPrompt], sampling: Sampling, on_reply: OnReply) -> None:
        """
        Raises:
            UserError: the server doesn't answer, or its answer isn't of these prompts and this sampling.
        """
        found: list[tuple[int, int, Reply]] = []
        if self._asks:
            with ThreadPoolExecutor(self._recipe.grpo.generation.batch) as threads:
                asked = {
                    threads.submit(self._reply, prompt, place, sample, sampling): (place, sample)
                    for place, prompt in enumerate(prompts)
                    for sample in range(sampling.samples)
                }
                try:
                    for future in as_completed(asked):
                        found.append((*asked[future], future.result()))
                        on_reply(*found[-1])
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            box = [found]
            torch.distributed.broadcast_object_list(box, torch.distributed.get_global_rank(group, 0), group=group)
            for place, sample, reply in () if self._asks else box[0]:
                on_reply(place, sample, reply)

    def _reply(self, prompt: TokenPrompt, place: int, sample: int, sampling: Sampling) -> Reply:
        number = (place if prompt.number is None else prompt.number) * sampling.samples + sample
        writer = Writer(prompt.think, sampling, self._generator.tokenizer, prompt.tokens, number)
        answer = self._server.chat(request(prompt, sampling, number))
        if answer.prompt != list(prompt.tokens):
            raise UserError(
                f"vLLM at {self._server.url} makes {len(answer.prompt)} tokens of a prompt that has "
                f"{len(prompt.tokens)} here; start it on {self._folder}"
            )
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            if writer.ended or (token in writer.banned() if writer.forced is None else token != writer.forced):
                raise UserError(
                    f"vLLM at {self._server.url} wrote token {token}, which can't stand where it does; start it with "
                    f"PYTHONPATH={self._folder} and --logits-processors bluelm_thinking:ThinkingBudget"
                )
            writer.add(token, logprob)
        return writer.reply()

    def free(self) -> None:
        """Nothing: the server keeps its own GPUs."""


def request(prompt: TokenPrompt, sampling: Sampling, number: int) -> dict[str, Any]:
    """The body of one reply's request, as vLLM's ``/v1/chat/completions`` takes it.

    Args:
        number: of the reply in the rollout; it and ``sampling.seed`` make the request's own seed.
    """
    images = iter(prompt.asked.images)
    seed = sha256(f"{sampling.seed}/{number}".encode()).digest()
    budget = {"closing_text": sampling.closing_text}
    if prompt.think is not None:
        budget["think"] = prompt.think
    if sampling.think_budget is not None:
        budget["think_budget"] = sampling.think_budget
    return {
        "messages": [_message(message, images) for message in prompt.asked.messages],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": int.from_bytes(seed[:4], "little") >> 1,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "chat_template_kwargs": {"enable_thinking": bool(prompt.think)},
        "vllm_xargs": budget,
    }


def _message(message: Message, images: Iterator[bytes]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [_image(next(images)) if part["type"] == "image" else part for part in content]
    thought = message.get("thinking")
    return {"role": message["role"], "content": content, **({} if thought is None else {"reasoning": thought})}


def _image(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()  # decoders look at the bytes
    return {"type": "image_url", "image_url": {"url": url}}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of JSON's objects."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def _make_checkpoint(place: Path, recipe: Recipe, tokenizer: bytes) -> None:
    """An empty checkpoint, for weights alone."""
    try:
        shutil.rmtree(place, ignore_errors=True)
        (place / WEIGHTS_DIR).mkdir(parents=True)
        (place / RECIPE_FILE).write_text(to_yaml(recipe))
        (place / TOKENIZER_FILE).write_bytes(tokenizer)
    except OSError as error:
        raise UserError(f"{place}, where the policy's weights are put for vLLM, can't be written: {error}") from error


def _on_first_rank(work: Callable[[], None]) -> None:
    """Do it on the first rank while the others wait; all raise its error."""
    problem = [None]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except UserError as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem, 0)
    if problem[0]:
        raise UserError(problem[0])
