"""Near copies of images: a difference hash of 256 bits, and the pairs within a Hamming distance."""

from collections.abc import Iterator

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.hashes.sha1 import sha1_hash64

from nemo_bluelm.data.decode.pillow import decode

_SIDE = 16
_BITS = _SIDE * _SIDE
_ROW = np.dtype([("document", "<u4"), ("text", "<u8"), ("hash", "u1", _BITS // 8)])
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # bits set in a byte


def difference_hash(data: bytes) -> bytes:
    """32 bytes: for each of 16 x 16 cells of the upright gray image, whether its right neighbour is brighter.

    Raises:
        BadImage: it can't be decoded.
    """
    from PIL import Image

    gray = np.asarray(decode(data).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX))
    return np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes()


class SignImages(PipelineStep):
    """Writes a row for each image of a task's documents, numbered from 0."""

    type = "🫂 - DEDUP"
    name = "sign images"

    def __init__(self, folder: str, same_text: bool):
        super().__init__()
        self.folder, self.same_text = get_datafolder(f"{folder}/signatures"), same_text

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        with self.folder.open(f"{rank:05d}.hashes", "wb") as file:
            for number, document in enumerate(data):
                text = sha1_hash64(document.text) if self.same_text else 0
                for image in document.metadata["seen"]:
                    code = np.frombuffer(bytes.fromhex(image["hash"]), np.uint8)
                    file.write(np.array((number, text, code), _ROW).tobytes())


class MatchImages(PipelineStep):
    """Lists for each task the documents whose images are all near ones of earlier documents."""

    type = "🫂 - DEDUP"
    name = "match images"

    def __init__(self, folder: str, max_distance: int):
        super().__init__()
        self.signatures, self.copies = get_datafolder(f"{folder}/signatures"), get_datafolder(f"{folder}/copies")
        self.max_distance = max_distance

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        names = self.signatures.list_files()
        rows = [np.frombuffer(self.signatures.cat_file(name), _ROW) for name in names]
        tasks = np.repeat([int(name.split(".")[0]) for name in names], [len(r) for r in rows])
        documents = np.concatenate([r["document"] for r in rows])
        groups = tasks.astype(np.int64) << 32 | documents
        codes = np.concatenate([r["hash"] for r in rows])
        near = find_near(codes, np.concatenate([r["text"] for r in rows]), groups, self.max_distance)
        kept = np.unique(groups[~near])
        gone = np.setdiff1d(np.unique(groups), kept)
        for task in np.unique(gone >> 32):
            numbers = (gone[gone >> 32 == task] & 0xFFFFFFFF).astype("<u4")
            with self.copies.open(f"{task:06d}.remove", "wb") as file:
                file.write(numbers.tobytes())
            self.stat_update("copies", value=len(numbers))


def find_near(codes: np.ndarray, texts: np.ndarray, groups: np.ndarray, max_distance: int) -> np.ndarray:
    """Which images are near an earlier one, of another document with the same text.

    Two codes that differ in at most d bits agree in one of d + 1 bands at least, so only images that share a band are
    compared. A band takes every (d + 1)-th bit: neighbouring cells say much the same.

    Args:
        codes: uint8 [n, 32]; texts: uint64 [n]; groups: int64 [n], the document of each image.
    """
    near = np.zeros(len(codes), bool)
    bits = np.unpackbits(codes, axis=1)
    bands = max_distance + 1
    for band in range(bands):
        part = np.packbits(bits[:, band::bands], axis=1)
        keys = np.concatenate([part, texts[:, None].view(np.uint8).reshape(len(texts), 8)], axis=1)
        for members in _same(np.ascontiguousarray(keys)):
            _mark(members[~near[members]], codes, groups, max_distance, near)
    return near


def _same(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers, ascending, of each set of two or more equal rows."""
    if not len(keys):
        return
    rows = keys.view(np.dtype((np.void, keys.shape[1]))).ravel()
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.r_[True, rows[order][1:] != rows[order][:-1]])
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            yield members


def _mark(members: np.ndarray, codes: np.ndarray, groups: np.ndarray, max_distance: int, near: np.ndarray) -> None:
    while len(members) > 1:
        first, members = members[0], members[1:]
        distance = _ONES[codes[members] ^ codes[first]].sum(1)
        close = (distance <= max_distance) & (groups[members] != groups[first])
        near[members[close]] = True
        members = members[~close]
