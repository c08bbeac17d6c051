"""A teacher's likeliest tokens, stored by document: how they lie on disk, and their way into packs.

The folder has ``meta.json`` and, for each shard, a folder named by the digest of its samples, which is the same
wherever the shard lies:

- ``documents.npy``: int64 [n, 4]: the sample's offset in its shard, its first token here, tokens, first row.
- ``ids.npy``: int32 [rows, k], likeliest first; row i of a document tells of its token i + 1.
- ``scores.npy``: float16 or float32 [rows, k], log-probabilities at temperature 1. Near 0, where it counts, they are
  finer than logits would be.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.errors import UserError

if TYPE_CHECKING:
    from nemo_bluelm.data.loader import Document, PackLoader

VERSION = 2
META_FILE = "meta.json"
DTYPES = ("float16", "float32")
MAKE = "tools/make_teacher_logits.py"
_OPEN = 64  # shards whose rows are mapped at a time


class ShardLogits(NamedTuple):
    """One shard's rows: where each (offset, first token) begins and how many tokens it has; ids and scores."""

    places: dict[tuple[int, int], tuple[int, int]]
    ids: np.ndarray
    scores: np.ndarray


def shard_folder(folder: Path, digest: str) -> Path:
    """Where the rows of the shard with this digest lie."""
    return folder / digest[:32]


class TeacherLogits:
    """Reads what ``tools/make_teacher_logits.py`` wrote. Safe to share between threads.

    Args:
        folder: the stored logits.
        loader: of the run that learns from them.
        top_k: how many of the stored tokens to take; None takes all.
        vocabulary: rows of the model's output layer.
        at_one: the run stays at temperature 1.

    Raises:
        UserError: the folder can't be read, or was made of other data, or has too few tokens.
    """

    def __init__(self, folder: Path, loader: "PackLoader", top_k: int | None, vocabulary: int, at_one: bool):
        self.folder, self._digests = folder, {}
        meta = read_meta(folder)
        stored, self._dtype = meta["top_k"], np.dtype(meta["dtype"])
        self.k = top_k or stored
        if self.k > stored:
            raise UserError(
                f"distill.top_k or top_k_end is {top_k}, but distill.logits {folder} has {stored} tokens; lower it"
            )
        if meta["vocabulary"] != vocabulary:
            raise UserError(
                f"model.language.vocab_size is {vocabulary}, but distill.logits {folder} is of a teacher with "
                f"{meta['vocabulary']}; make them equal"
            )
        if not at_one and self.k < vocabulary:
            raise UserError(
                f"distill.temperature is not 1, but of the likeliest {self.k} tokens in distill.logits {folder} the "
                "others' share is known at 1 only; set distill.temperature=1, or use distill.teacher"
            )
        plan = loader.plan
        for key, value in meta["settings"].items():
            if plan.index.settings[key] != value:
                raise UserError(
                    f"{key} is {plan.index.settings[key]}, but distill.logits {folder} was made with {value}; make "
                    "them equal, or make the logits again"
                )
        for shard in (shard for table in plan.tables for shard in table.shards):
            self._digests[shard.name] = shard.digest
            if len(shard) and not shard_folder(folder, shard.digest).is_dir():
                raise UserError(f"distill.logits {folder} has nothing of shard {shard.name}; run {MAKE} for it")
        self._shard = lru_cache(_OPEN)(self._open)

    def add_to(self, batch: PackedBatch, documents: Sequence["Document"]) -> PackedBatch:
        """The pack with ``teacher_ids`` and ``teacher_scores`` of its documents; bad ones have no targets to learn.

        Raises:
            UserError: a document is not there.
        """
        length = batch.tokens.size(1)
        ids = np.tile(np.arange(self.k, dtype=np.int32), (length, 1))
        scores = np.full((length, self.k), -np.log(self.k), dtype=self._dtype)
        for document, start in zip(documents, batch.bounds):
            if document.bad is not None:
                continue
            sample, rows = document.sample, self._shard(document.sample.shard)
            first, tokens = rows.places.get((sample.offset, document.start), (0, 0))
            if tokens != document.length:
                raise UserError(
                    f"distill.logits {self.folder} has no {document.length} tokens from {document.start} on of "
                    f"{sample.where}: they were made with another data.sequence_length or data.oversize, or the "
                    f"sample was bad then; run {MAKE} into another folder"
                )
            here, there = slice(start, start + tokens - 1), slice(first, first + tokens - 1)
            ids[here], scores[here] = rows.ids[there, : self.k], rows.scores[there, : self.k]
        return replace(batch, teacher_ids=torch.from_numpy(ids)[None], teacher_scores=torch.from_numpy(scores)[None])

    def _open(self, shard: str) -> ShardLogits:
        folder = shard_folder(self.folder, self._digests[shard])
        try:
            documents, *rows = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("documents", "ids", "scores")
            )
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"distill.logits {folder} is damaged ({error}); remove it and run {MAKE} again") from error
        places = {(offset, start): (first, tokens) for offset, start, tokens, first in documents.tolist()}
        return ShardLogits(places, *rows)


def read_meta(folder: Path) -> dict[str, Any]:
    """What the folder says of itself.

    Raises:
        UserError: it has none, or one of another version.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"distill.logits {folder} has no readable {META_FILE}; {MAKE} makes such folders") from error
    if meta.get("version") != VERSION:
        raise UserError(f"distill.logits {folder} has version {meta.get('version')}, not {VERSION}; make it again")
    return meta
