"""VLMEvalKit: our checkpoints as one of its models.

with open_generator(checkpoint) as generator:
    infer_data_job(KitModel(generator), work_dir=..., model_name="bluelm", dataset=build_dataset("MMMU_DEV_VAL"))
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling


class KitModel:
    """What the kit's ``inference.py`` calls of a model; nothing of the kit is imported.

    Args:
        think: answer with a thought.
        sampling: how replies are written, the thinking budget included (greedy, 2048 tokens).
        thoughts: hand thoughts over too, between ``<think>`` and ``</think>``, as the kit's SPLIT_THINK wants them.
    """

    INTERLEAVE = True
    is_api = False
    allowed_types = ("text", "image")

    def __init__(
        self, generator: Generator, think: bool = False, sampling: Optional[Sampling] = None, thoughts: bool = False
    ):
        self._generator, self._think, self._thoughts = generator, think, thoughts
        self._sampling = sampling or Sampling(2048)
        self.dump_image_func: Optional[Callable] = None

    def set_dump_image(self, dump_image_func: Callable) -> None:
        """The kit's way to hand out images; a dataset's own prompts already name files."""
        self.dump_image_func = dump_image_func

    def use_custom_prompt(self, dataset: str) -> bool:
        """The datasets' own prompts are used."""
        return False

    def generate(self, message: str | dict | Sequence[str | dict], dataset: Optional[str] = None) -> str:
        """The answer to texts and images in turns.

        Args:
            message: ``{"type": "text" | "image", "value": text or path}``, several of them, or texts.

        Raises:
            UserError: another type, an image that can't be read.
        """
        return self.generate_inner(self._listed(message), dataset)

    def generate_inner(self, message: Sequence[dict], dataset: Optional[str] = None) -> str:
        """As :meth:`generate`, for a list of mappings."""
        parts: list[dict] = []
        images = []
        for item in message:
            if item["type"] == "image":
                images.append(_read(item["value"]))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": item["value"]})
        prompt = Prompt([{"role": "user", "content": parts}], images, self._think)
        (reply,) = self._generator.generate([prompt], self._sampling)
        if self._thoughts and reply.thought is not None:
            return f"<think>{reply.thought}</think>{reply.answer}"
        return reply.answer

    def _listed(self, message: Any) -> list[dict]:
        items = [message] if isinstance(message, (str, dict)) else list(message)
        items = [{"type": "text", "value": item} if isinstance(item, str) else item for item in items]
        for item in items:
            if item.get("type") not in self.allowed_types or not isinstance(item.get("value"), str):
                raise UserError(f"a message has the part {item!r:.80}; parts are texts and paths of images")
        return items


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"image {path} can't be read: {error.strerror}") from error
