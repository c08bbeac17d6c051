"""The pack inspector: one row of training tokens as a page, documents, loss mask and image tiles in place."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.report.tokens import special_kinds, token_texts, visible

if TYPE_CHECKING:
    from nemo_bluelm.data.index import ImageEntry
    from nemo_bluelm.data.loader import Document, LoadedPack

TEMPLATES = Path(__file__).parent / "templates"
LARGEST_TILE = 189  # shown side of a tile, px: a full pack of 64 photos' tiles stays below 8 MB
PALETTE = 8  # source colours in pack.css


@dataclass(frozen=True)
class Row:
    """A pack's tensors as numpy arrays of S tokens, and the borders of its segments."""

    tokens: np.ndarray
    labels: np.ndarray
    trained: np.ndarray  # bool: the label at this place counts in the loss
    positions: np.ndarray
    real: list[int]  # cu_seqlens
    padded: list[int]  # cu_seqlens_padded
    tiles: np.ndarray  # uint8 [tiles, T, T, 3]

    @classmethod
    def of(cls, batch: PackedBatch) -> "Row":
        tensors = (batch.tokens, batch.labels, batch.loss_mask > 0, batch.position_ids)
        arrays = (tensor[0].cpu().numpy() for tensor in tensors)
        tiles = batch.tiles.permute(0, 2, 3, 1).cpu().numpy()
        return cls(*arrays, batch.cu_seqlens.tolist(), batch.cu_seqlens_padded.tolist(), tiles)

    def segment(self, k: int) -> tuple[int, int, int]:
        """(first, end of the real tokens, end) of segment k in the row."""
        first = self.padded[k]
        return first, first + self.real[k + 1] - self.real[k], self.padded[k + 1]


def checks(row: Row, documents: Sequence["Document"], tokenizer: Tokenizer, geometry: Geometry) -> list[dict]:
    """What must hold for every pack, as ``{"what": text, "wrong": row positions or counts that break it}``."""
    ends = [row.segment(k) for k in range(len(row.padded) - 1)]
    inside = np.zeros(len(row.tokens), bool)  # the token after this one is of the same document
    restart = np.empty_like(row.positions)
    hole = np.zeros(len(row.tokens), bool)
    for k, (first, real, end) in enumerate(ends):
        inside[first : max(first, real - 1)] = True
        restart[first:end] = np.arange(end - first)
        hole[first:end] = k < len(documents) and documents[k].bad is not None
    following = np.append(row.tokens[1:], -1)
    image_tokens = int((row.tokens == tokenizer.image).sum())
    spare = image_tokens - len(row.tiles) * geometry.tokens_per_tile
    return [
        {
            "what": "every label in the loss is the next token of its document",
            "wrong": np.flatnonzero(row.trained & (~inside | (row.labels != following))).tolist(),
        },
        {"what": "no hole has a target", "wrong": np.flatnonzero(row.trained & hole).tolist()},
        {
            "what": "position ids restart at 0 in every segment",
            "wrong": np.flatnonzero(row.positions != restart).tolist(),
        },
        {
            "what": f"{image_tokens:,} image tokens belong to {len(row.tiles):,} tiles",
            "wrong": np.flatnonzero(row.tokens == tokenizer.image)[-abs(spare) :].tolist() if spare else [],
        },
    ]


def render(pack: "LoadedPack", tokenizer: Tokenizer, geometry: Geometry) -> str:
    """The page of a pack: HTML that stands alone, with images and script inside and nothing from a network.

    Args:
        pack: as the loader delivers it; ``batch`` on any device.
        tokenizer: the one that encoded it.
        geometry: the model's, to lay an image's tiles out as its grid.
    """
    row = Row.of(pack.batch)
    writer = _Writer(row, tokenizer, geometry)
    names = sorted({document.source for document in pack.documents})
    color = {name: number % PALETTE for number, name in enumerate(names)}
    documents = [
        writer.document(k, document) | {"color": color[document.source]} for k, document in enumerate(pack.documents)
    ]
    tail = len(row.tokens) - (row.padded[len(pack.documents)] if documents else 0)
    script = (TEMPLATES / "pack.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("pack.html.j2").render(
        number=pack.number,
        documents=documents,
        sources=_sources(documents, names, color),
        checks=checks(row, pack.documents, tokenizer, geometry),
        capacity=len(row.tokens),
        real=row.real[-1],
        aligned=sum(document["padding"] for document in documents),
        tail=tail,
        targets=int(row.trained.sum()),
        tiles=len(row.tiles),
        cu_seqlens=row.real,
        cu_seqlens_padded=row.padded,
        shown=min(geometry.tile, LARGEST_TILE),
        tile=geometry.tile,
        style=Markup((TEMPLATES / "pack.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _sources(documents: list[dict], names: list[str], color: dict[str, int]) -> list[dict]:
    """Share of the pack by source."""
    total = max(1, sum(document["length"] for document in documents))
    sources = []
    for name in names:
        mine = [document for document in documents if document["source"] == name]
        sums = {key: sum(document[key] for document in mine) for key in ("length", "targets", "tiles")}
        share = sums["length"] / total
        sources.append({"name": name, "color": color[name], "documents": len(mine), "share": share} | sums)
    return sources


class _Writer:
    """Turns documents into HTML, in order: each image takes the row's next tiles."""

    def __init__(self, row: Row, tokenizer: Tokenizer, geometry: Geometry):
        self._row, self._tokenizer, self._geometry = row, tokenizer, geometry
        self._kinds = special_kinds(tokenizer)
        self._next_tile = 0

    def document(self, k: int, document: "Document") -> dict:
        """What the template shows of segment ``k``."""
        row, sample = self._row, document.sample
        first, real, end = row.segment(k)
        first_tile = self._next_tile
        body = self._body(first, real, sample.images) + (_pads(end - real) if end > real else "")
        return {
            "number": k + 1,
            "source": document.source,
            "shard": sample.shard,
            "key": sample.key,
            "epoch": document.epoch,
            "bad": document.bad,
            "whole": sample.tokens,
            "start": document.start,
            "length": real - first,
            "padding": end - real,
            "first": first,
            "real": real,
            "end": end,
            "targets": int(row.trained[first:end].sum()),
            "tiles": self._next_tile - first_tile,
            "cu_seqlens": row.real[k : k + 2],
            "cu_seqlens_padded": row.padded[k : k + 2],
            "body": body,
            "data": self._data(first, end),
        }

    def _body(self, first: int, end: int, images: Sequence["ImageEntry"]) -> Markup:
        """The tokens of a document; a run of image tokens becomes one figure, a run of pad tokens one mark."""
        row, tokenizer = self._row, self._tokenizer
        collapsed = (tokenizer.image, tokenizer.pad)
        ids = row.tokens[first:end].tolist()
        # Token i is a target where the place before it has it as a label in the loss.
        target = [False, *row.trained[first : max(first, end - 1)].tolist()]
        texts = token_texts(ids, tokenizer)
        html: list[str] = []
        at = seen = 0
        while at < len(ids):
            run = 1
            while ids[at] in collapsed and at + run < len(ids) and ids[at + run] == ids[at]:
                run += 1
            if ids[at] == tokenizer.image:
                html.append(self._figure(run, first + at, images[seen] if seen < len(images) else None))
                seen += 1
            elif ids[at] == tokenizer.pad:
                html.append(_pads(run))
            else:
                html.append(self._token(ids[at], texts[at], target[at]))
            at += run
        return Markup("".join(html))

    def _token(self, token: int, text: str | None, target: bool) -> str:
        tag = "b" if target else "i"
        if token in self._kinds:
            return f'<{tag} class="s {self._kinds[token]}">{visible(text)}</{tag}>'
        if text is None:
            return f"<{tag} class=u>\u00b7</{tag}>"
        return f"<{tag}>{visible(text)}</{tag}>"

    def _figure(self, tokens: int, position: int, image: "ImageEntry | None") -> Markup:
        """An image's tiles: the grid as on the canvas, then the thumbnail."""
        count = tokens // self._geometry.tokens_per_tile
        tiles = self._row.tiles[self._next_tile : self._next_tile + count]
        first, self._next_tile = self._next_tile, self._next_tile + count
        cols, rows, size = count, 1, ""
        if image is not None and self._geometry.tiles(image.width, image.height) == count:
            cols, rows = self._geometry.grid(image.width, image.height)
            size = f"{image.name}, {image.width} \u00d7 {image.height} px, "
        thumbnail = count - cols * rows
        pictures = [_picture(tile, f"tile {k + 1}" if k < cols * rows else "thumbnail") for k, tile in enumerate(tiles)]
        caption = f"{size}grid {cols} \u00d7 {rows}{' + thumbnail' if thumbnail else ''}"
        place = f"row {position:,}\u2013{position + tokens - 1:,}"
        return Markup(
            '<figure data-n="{}"><div class=tiles><div class=grid style="--cols:{}">{}</div>{}</div>'
            "<figcaption><strong>{:,} image tokens</strong>, {} tile{} (from tile {} of the pack)<br>{}<br>{}"
            "</figcaption></figure>"
        ).format(
            tokens,
            cols,
            Markup("").join(pictures[: cols * rows]),
            Markup("").join(pictures[cols * rows :]),
            tokens,
            count,
            "s" if count != 1 else "",
            first,
            caption,
            place,
        )

    def _data(self, first: int, end: int) -> str:
        """What the tooltips need, as JSON of numbers: ids, and labels and position ids where they aren't the usual."""
        row = self._row
        tokens, labels, positions = (a[first:end].tolist() for a in (row.tokens, row.labels, row.positions))
        usual = [*tokens[1:], None]
        data = {
            "first": first,
            "ids": tokens,
            "labels": {i: label for i, label in enumerate(labels) if label != usual[i]},
            "positions": {i: position for i, position in enumerate(positions) if position != i},
            "trained": "".join("01"[trained] for trained in row.trained[first:end]),
        }
        return Markup(json.dumps(data, separators=(",", ":")))


def _pads(count: int) -> Markup:
    return Markup('<i class=pads data-n="{0}"><span>{0:,} \u00d7 &lt;pad&gt;, masked</span></i>').format(count)


def _picture(tile: np.ndarray, label: str) -> Markup:
    image = Image.fromarray(tile)
    if image.width > LARGEST_TILE:
        image = image.resize((LARGEST_TILE, LARGEST_TILE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return Markup('<img alt="{0}" title="{0}" src="data:image/png;base64,{1}">').format(label, data)
