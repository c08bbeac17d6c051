"""The stream of packs that training reads: index, plan, read, decode, encode, collate."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.images import load_tiles
from nemo_bluelm.data.index import Sample, build_index, image_token_counts
from nemo_bluelm.data.packs import PackedBatch, collate
from nemo_bluelm.data.plan import WINDOW, Plan, PlanSource
from nemo_bluelm.data.records import Record, located
from nemo_bluelm.data.shards import ShardReader
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

_VERSION = 1  # raise it with any change of format, order or packing: it makes old fingerprints differ


class PackStream:
    """``stream[i]`` is pack ``i`` = 0, 1, 2, ... without end: a pure function of (config, index, seed, i).

    Only the packs asked for read payloads; the plan before them is replayed from lengths.

    Attributes:
        tokenizer: the loaded tokenizer.
        index: samples by source.
        fingerprint: SHA-256 (hex) of all that determines the stream: mixture, caps, geometry, seed, alignment,
            tokenizer file, and for each sample its place, lengths, image sizes and JSON. Pixels are not hashed;
            data.root is not part of it, so a moved corpus is the same stream.
    """

    def __init__(self, data: Any, geometry: Geometry, seed: int, alignment: int = 1):
        """Builds the index.

        Args:
            data: a ``DataConfig`` or a node with its keys.
            alignment: every document's length in the row is a multiple of it (tensor and context parallelism, FP8).

        Raises:
            UserError: as :func:`build_index` and ``Tokenizer.load``; a weight that isn't positive; a sequence length
                that isn't a multiple of the alignment.
        """
        if data.sequence_length % alignment:
            nearest = max(1, round(data.sequence_length / alignment)) * alignment
            raise UserError(
                f"data.sequence_length is {data.sequence_length}, not a multiple of {alignment} as the layout needs; "
                f"the nearest is {nearest}"
            )
        for name, source in data.sources.items():
            if not 0 < source.weight < math.inf:
                raise UserError(f"data.sources.{name}.weight is {source.weight}; make it positive or remove the source")
        self._geometry, self._alignment = geometry, alignment
        self._sequence_length = data.sequence_length
        path = Path(data.root) / data.tokenizer
        self.tokenizer = Tokenizer.load(path)
        self.index = build_index(data, self.tokenizer, geometry)
        self._reader = ShardReader(Path(data.root))
        self._samples = list(self.index.values())
        self._weights = {name: float(data.sources[name].weight) for name in self.index}
        sources = [
            PlanSource(name, self._weights[name], [s.tokens for s in samples], [s.tiles for s in samples])
            for name, samples in self.index.items()
        ]
        self.plan = Plan(sources, seed, data.sequence_length, data.max_tiles, alignment)
        self.fingerprint = _fingerprint(
            version=_VERSION,
            window=WINDOW,
            sequence_length=data.sequence_length,
            max_tiles=data.max_tiles,
            weights=list(self._weights.items()),
            geometry=dataclasses.asdict(geometry),
            seed=seed,
            alignment=alignment,
            tokenizer=hashlib.sha256(path.read_bytes()).hexdigest(),
            samples=[[dataclasses.astuple(sample) for sample in samples] for samples in self._samples],
        )

    def __getitem__(self, i: int) -> PackedBatch:
        """Pack ``i``.

        Raises:
            IndexError: a negative ``i``.
            UserError: a sample that changed since the index was built, or whose pixels don't decode.
        """
        documents = [self._load(self._samples[draw.source][draw.sample]) for draw in self.plan.pack(i)]
        side = self._geometry.tile
        tiles = [torch.empty(0, 3, side, side, dtype=torch.uint8), *(tiles for _, tiles in documents)]
        encoded = [document for document, _ in documents]
        return collate(encoded, torch.cat(tiles), self._sequence_length, self._alignment, self.tokenizer.pad)

    def summary(self) -> dict[str, dict[str, float]]:
        """By source: samples, tokens and tiles of one epoch, weight, and share of the tokens planned so far."""
        drawn = self.plan.tokens_drawn()
        total = max(1, sum(drawn))
        return {
            name: {
                "samples": len(samples),
                "tokens": sum(sample.tokens for sample in samples),
                "tiles": sum(sample.tiles for sample in samples),
                "weight": self._weights[name] / sum(self._weights.values()),
                "share": tokens / total,
            }
            for (name, samples), tokens in zip(self.index.items(), drawn)
        }

    def _load(self, sample: Sample) -> tuple[Encoded, torch.Tensor]:
        payload = self._reader.read(sample.shard, sample.json)
        if hashlib.sha256(payload).hexdigest() != sample.digest:
            raise UserError(f"{sample.where} changed since it was indexed; restore it, or start the run again")
        encoded = Record.parse(payload).encode(self.tokenizer, image_token_counts(sample.images, self._geometry))
        piece = slice(sample.start, sample.start + sample.tokens)
        document = Encoded(encoded.tokens[piece], encoded.loss_mask[piece], encoded.images)
        side = self._geometry.tile
        tiles = [torch.empty(0, 3, side, side, dtype=torch.uint8)]
        with located(sample.where):
            for image in sample.images:
                data = self._reader.read(sample.shard, image.member)
                tiles.append(load_tiles(data, self._geometry, f"image {sample.key}.{image.name}"))
        loaded = torch.cat(tiles)
        if len(loaded) != sample.tiles:
            raise UserError(f"{sample.where}: an image changed since it was indexed; restore it, or start again")
        return document, loaded


def _fingerprint(**parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
