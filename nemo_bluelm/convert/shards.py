"""Safetensors of a Hugging Face folder, one file or many: read and written a tensor at a time."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_bluelm.convert.table import count_bytes
from nemo_bluelm.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD_BYTES = 4 * 2**30  # of the files that are written
_ROWS = 2**22  # elements that are summed at once: PyTorch makes a copy in the sum's dtype
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(NamedTuple):
    """What a file says of one of its tensors."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The tensors of a folder by name.

    Attributes:
        headers: of every tensor; of them alone the files are read when the folder is opened.

    Raises:
        UserError: files that are missing, cut or no safetensors; an index that names what isn't there.
    """

    def __init__(self, folder: Path):
        self.folder, self.headers = folder, {}
        listed = _listed(folder)
        for path in sorted(set(listed.values())) if listed else [folder / WEIGHTS]:
            self.headers |= _headers(path)
        missing = sorted(set(listed) - set(self.headers))
        if missing:
            raise UserError(
                f"{listed[missing[0]]} lacks {missing[0]}, which {INDEX} says it has; fetch that file again"
            )

    def read(self, name: str) -> Tensor:
        """
        Raises:
            UserError: it can't be read, or isn't finite.
        """
        path = self.headers[name].path
        with _open(path) as file:
            tensor = file.get_tensor(name)
        if not all(math.isfinite(rows.sum(dtype=torch.float64)) for rows in tensor.flatten().split(_ROWS)):
            raise UserError(f"{path}: {name} has values that are not finite; fetch that file again")
        return tensor


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    data: Iterator[Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder's tensors as they come.

    safetensors' own writer holds a copy of a whole file in memory.

    Args:
        tensors: name, dtype and shape of each.
        data: the tensors in that order.
        shard_bytes: size of a file, where no single tensor is larger.

    Raises:
        OSError: the disk is full, say.
    """
    shards: list[list] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        count = count_bytes(shape, dtype)
        if size and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape, count))
        size += count
    total, files = 0, {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / name, "wb") as file:
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for tensor, dtype, shape, count in shard:
                header[tensor] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [end, end + count]}
                end += count
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor, dtype, shape, _ in shard:
                value = next(data)
                assert (value.dtype, tuple(value.shape)) == (dtype, tuple(shape)), tensor
                file.write(value.contiguous().flatten().view(torch.uint8).numpy())
                files[tensor] = name
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """
    Raises:
        UserError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; name a Hugging Face model's folder") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; fetch it again")
    return content


def _listed(folder: Path) -> dict[str, Path]:
    """File of each tensor by the index; empty where there is one file alone."""
    if (folder / WEIGHTS).exists():
        return {}
    if not (folder / INDEX).exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise UserError(f"{folder} has pickled weights; save the model as safetensors and import that")
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; name a Hugging Face model's folder")
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{folder / INDEX} has no weight_map; fetch it again")
    return {name: folder / file for name, file in files.items()}


def _headers(path: Path) -> dict[str, Header]:
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: Header(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or 'no such file'}; fetch it again") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from error
