"""From the data part of a recipe to a loader: tokenizer, index, plan, decode backend."""

from collections.abc import Callable
from typing import Any

from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.data.files import Files, expand
from nemo_bluelm.data.foreign import converted
from nemo_bluelm.data.index import Index, build_index
from nemo_bluelm.data.loader import PackLoader
from nemo_bluelm.data.plan import MixturePlan
from nemo_bluelm.data.table import Source
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry


def find(data: Any) -> tuple[Tokenizer, dict[str, list[str]]]:
    """The tokenizer, and the shards of each source by their names alone: nothing of them is read.

    Args:
        data: a ``DataConfig`` or a node with its keys.

    Raises:
        UserError: as ``Tokenizer.load``; no source, a pattern without shards.
    """
    if not data.sources:
        raise UserError("data.sources is empty; name at least one source with its shards")
    tokenizer = Tokenizer.load(Files(data.root).absolute(data.tokenizer))
    shards = {}
    for name, source in data.sources.items():
        try:
            shards[name] = expand(data.root, source.shards)
        except UserError as error:
            raise UserError(f"data.sources.{name}.shards: {error}") from error
    return tokenizer, shards


def open_index(
    data: Any, geometry: Geometry, progress: Callable | None = None
) -> tuple[Index, Tokenizer, dict[str, list[str]]]:
    """Index what the sources name, reading only shards that are new or changed.

    Args:
        data: a ``DataConfig`` or a node with its keys.
        progress: as :func:`nemo_bluelm.data.index.build_index`.

    Returns:
        The index, the tokenizer, and the shards of each source.

    Raises:
        UserError: as :func:`find` and ``build_index``.
    """
    tokenizer, shards = find(data)
    for name, source in data.sources.items():
        if reader := source.get("reader") if hasattr(source, "get") else source.reader:
            shards[name] = converted(shards[name], reader, data.root, data.index, f"data.sources.{name}")
    union = sorted({shard for names in shards.values() for shard in names})
    return build_index(union, data.index, geometry, tokenizer, root=data.root, progress=progress), tokenizer, shards


def open_data(
    data: Any, geometry: Geometry, seed: int, alignment: int = 1, progress: Callable | None = None
) -> PackLoader:
    """The loader of a run, its plan at the first pack.

    Args:
        data: a ``DataConfig`` or a node with its keys.
        seed: of the order.
        alignment: each document's length in a row is rounded up to a multiple of it.
        progress: as :func:`nemo_bluelm.data.index.build_index`.

    Raises:
        UserError: as :func:`open_index`, ``MixturePlan`` and ``get_backend``.
    """
    decode = data.decode
    backend = get_backend(_plain(decode.backend), _plain(decode.device), max(1, decode.threads))
    index, tokenizer, shards = open_index(data, geometry, progress)
    sources = {
        name: Source(shards[name], source.weight, source.max_epochs, dict(source.resample))
        for name, source in data.sources.items()
    }
    limits = data.sequence_length, data.max_tiles, alignment, _plain(data.oversize), data.max_documents
    plan = MixturePlan(index, sources, seed, *limits)
    return PackLoader(
        plan, Files(data.root), tokenizer, geometry, backend, data.max_bad_fraction, data.chat.control_token
    )


def _plain(choice: Any) -> str:
    """A choice as text: a checkpoint holds no types of ours."""
    return getattr(choice, "value", choice)
