"""The pack inspector shows the tensors as they are: every token, target, tile and hole; a text's markup is inert."""

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bluelm.data.chat import Encoded, encode_conversation, encode_document
from nemo_bluelm.data.index import ImageEntry, Sample
from nemo_bluelm.data.loader import Document, LoadedPack
from nemo_bluelm.data.packs import collate
from nemo_bluelm.data.shards import Member
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.report.pack import Row, checks, render
from nemo_bluelm.report.tokens import token_texts, visible

GEOMETRY = Geometry(tile=56)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\u4f60\u597d \U0001f642\nnext\x00\u202eline"

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What\nis it?"}]}


class Page(HTMLParser):
    """What a browser makes of the page: documents as (tag, classes, text, count), images, links, scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.documents: list[list[list]] = []
        self.images: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if tag == "div" and classes == ["tokens"]:
            self.documents.append([])
        elif self._inside() == "tokens" and tag in ("i", "b", "figure"):
            self.documents[-1].append([tag, classes, "", int(attrs.get("data-n", 1))])
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag == "img":
            self.images.append((attrs["alt"], attrs["src"]))
        elif tag not in ("meta", "br"):
            self._open.append((tag, "tokens" if classes == ["tokens"] else "mark" if classes == ["n"] else ""))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] in ("script", "style"):
            self.scripts += [data] * (self._open[-1][0] == "script")
            return
        self.text.append(data)
        if any(kind == "tokens" for _, kind in self._open) and self._open[-1][1] != "mark":
            self.documents[-1][-1][2] += data

    def _inside(self) -> str:
        return self._open[-1][1] if self._open else ""


def sample(key: str, encoded: Encoded, images: tuple[ImageEntry, ...] = (), tiles: int = 0) -> Sample:
    return Sample(
        shard=f"{key}-0.tar", key=key, offset=0, json=Member(0, 1), tokens=len(encoded.tokens), tiles=tiles,
        least=1, text=not images, images=images, tags=(), digest=b"",
    )  # fmt: skip


@pytest.fixture
def pack(tokenizer) -> LoadedPack:
    """A photo of seven tiles, a hostile text, a hole, a piece of a long text, a photo of one tile; alignment 8."""
    entry = ImageEntry("0.png", "photos-0.tar", Member(0, 1), 168, 112)
    icon = ImageEntry("0.png", "photos-0.tar", Member(0, 1), 30, 30)
    count = GEOMETRY.tiles(168, 112)
    reply = {"role": "assistant", "content": "A cat.", "thinking": "Fur\nand ears"}
    photo = encode_conversation([QUESTION, reply], tokenizer, [GEOMETRY.image_tokens(168, 112)])
    text = encode_document(EVIL, tokenizer)
    hole = Encoded([tokenizer.pad] * 21, [False] * 21)
    long = encode_document("one two three four five six seven", tokenizer)
    piece = Encoded(long.tokens[4:], long.loss_mask[4:])
    small = encode_conversation([QUESTION, {"role": "assistant", "content": "A dog."}], tokenizer, [4])
    tiles = torch.arange(count + 1, dtype=torch.uint8)[:, None, None, None].expand(count + 1, 3, 56, 56) * 30
    batch = collate([photo, text, hole, piece, small], tiles.contiguous(), 256, 8, tokenizer.pad)
    documents = (
        Document("photos", 0, sample("photos", photo, (entry,), count), 0, len(photo.tokens), None),
        Document("web", 2, sample("<b>web</b>", text), 0, len(text.tokens), None),
        Document("photos", 1, sample("broken", hole, (entry,), count), 0, 21, "image 0.png: <i>truncated</i>"),
        Document("books", 0, sample("long", long), 4, len(piece.tokens), None),
        Document("photos", 0, sample("small", small, (icon,), 1), 0, len(small.tokens), None),
    )
    return LoadedPack(12, batch, documents)


@pytest.fixture
def page(pack, tokenizer) -> Page:
    return Page(render(pack, tokenizer, GEOMETRY))


def test_every_token_is_there_once_and_marked_as_the_loss_mask_says(pack, page):
    """The token after a place with a label in the loss is a target, be it a newline, </think> or </s>."""
    row = Row.of(pack.batch)
    assert len(page.documents) == 5
    for k, elements in enumerate(page.documents):
        first, real, end = row.segment(k)
        assert sum(count for *_, count in elements) == end - first
        at = first
        for tag, _, _, count in elements:
            assert (tag == "b") == (at > first and bool(row.trained[at - 1])), at
            at += count
    thought = next(e for e in page.documents[0] if "</think>" in e[2])
    assert thought[0] == "b" and page.documents[0][-2][:1] == ["b"] and "</s>" in page.documents[0][-2][2]


def test_a_hidden_target_is_shown_as_context(pack, tokenizer):
    """Someone masks one target: that token, and no other, loses its mark."""
    mask = pack.batch.loss_mask.clone()
    place = int(mask[0].nonzero()[3])
    mask[0, place] = 0
    hidden = dataclasses.replace(pack, batch=dataclasses.replace(pack.batch, loss_mask=mask))
    before, after = (
        [element[0] for element in Page(render(p, tokenizer, GEOMETRY)).documents[0]] for p in (pack, hidden)
    )
    changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    assert len(changed) == 1 and (before[changed[0]], after[changed[0]]) == ("b", "i")


def test_texts_are_complete(pack, page, tokenizer):
    row = Row.of(pack.batch)
    for k in (1, 3):
        first, real, _ = row.segment(k)
        shown = "".join(
            text for _, classes, text, _ in page.documents[k] if "u" not in classes and "pads" not in classes
        )
        expected = tokenizer.decode(row.tokens[first:real].tolist())
        assert shown == "".join(char for char in expected if char.isprintable() or char == "\n")


def test_a_texts_markup_is_inert(page):
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in "".join(e[2] for e in page.documents[1])
    assert not any("alert" in script for script in page.scripts)
    assert all(src.startswith("data:image/png;base64,") for _, src in page.images)
    assert any("<b>web</b>" in text for text in page.text)
    assert any("<i>truncated</i>" in text for text in page.text)


def test_only_our_script_may_run_and_nothing_is_fetched(pack, tokenizer):
    html = render(pack, tokenizer, GEOMETRY)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    assert base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in Page(html).links)


def test_invisible_characters_have_marks(pack, tokenizer):
    html = render(pack, tokenizer, GEOMETRY)
    assert "\x00" not in html and "\u202e" not in html
    assert "U+0000" in html and "U+202E" in html
    assert str(visible("a\n<")) == "a<span class=n>\u21b5</span>\n&lt;"


def test_tiles_are_the_batchs_in_order(pack, page):
    assert [alt for alt, _ in page.images] == [*(f"tile {k}" for k in range(1, 7)), "thumbnail", "tile 1"]
    assert len(page.images) == len(pack.batch.tiles)
    for tile, (_, source) in zip(pack.batch.tiles, page.images):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
        assert (pixels == tile.permute(1, 2, 0).numpy()).all()
    figure = next(element for element in page.documents[0] if element[0] == "figure")
    assert figure[3] == GEOMETRY.image_tokens(168, 112)
    assert "28 image tokens" in figure[2] and "grid 3 \u00d7 2 + thumbnail" in figure[2]


def test_large_tiles_are_shrunk(pack, tokenizer):
    geometry = Geometry(tile=378, patch=54, merge=4)  # 4 tokens a tile, as the small one
    tiles = torch.zeros(len(pack.batch.tiles), 3, 378, 378, dtype=torch.uint8)
    large = dataclasses.replace(pack, batch=dataclasses.replace(pack.batch, tiles=tiles))
    html = render(large, tokenizer, geometry)
    source = Page(html).images[0][1]
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (189, 189)
    assert "189 &times; 189 of 378 &times; 378" in html


def test_holes_padding_and_tail_are_named(pack, page):
    text = " ".join(" ".join(page.text).split())
    assert "Bad sample, left as a hole of pad tokens without loss: image 0.png: <i>truncated</i>" in text
    assert "21 \u00d7 <pad>, masked" in text
    tail = 256 - pack.batch.cu_seqlens_padded[-2].item()
    assert f"tail: {tail} \u00d7 <pad>" in text
    assert "tokens 4\u2013" in text  # the piece of the long text


def test_header_numbers(pack, page):
    text = " ".join(" ".join(page.text).split())
    real = int(pack.batch.cu_seqlens[-1])
    for expected in (
        "Pack 12", f"{real / 256:.1%} fill", f"{real} real tokens of 256", f"{pack.batch.num_tokens} targets",
        f"{len(pack.batch.tiles)} image tiles", "1 bad sample",
    ):  # fmt: skip
        assert expected in text, expected
    for name in ("photos", "web", "books"):
        mine = sum(document.length for document in pack.documents if document.source == name)
        assert re.search(rf"{name} \d {mine} {mine / real:.1%}", text), name


def test_tooltips_get_the_tensors(pack, page):
    """Ids, labels, positions and mask of a segment can be had back from what the page carries."""
    row = Row.of(pack.batch)
    carried = [json.loads(script) for script in page.scripts[:-1]]
    for k, data in enumerate(carried):
        first, _, end = row.segment(k)
        assert data["first"] == first and data["ids"] == row.tokens[first:end].tolist()
        usual = [*data["ids"][1:], None]
        labels = [data["labels"].get(str(i), usual[i]) for i in range(end - first)]
        assert labels == row.labels[first:end].tolist()
        assert [data["positions"].get(str(i), i) for i in range(end - first)] == row.positions[first:end].tolist()
        assert [c == "1" for c in data["trained"]] == row.trained[first:end].tolist()


def test_checks_pass_and_each_can_fail(pack, tokenizer):
    def broken(**changes: torch.Tensor) -> list[bool]:
        row = Row.of(dataclasses.replace(pack.batch, **changes))
        return [bool(check["wrong"]) for check in checks(row, pack.documents, tokenizer, GEOMETRY)]

    assert broken() == [False] * 4
    labels = pack.batch.labels.clone()
    labels[0, pack.batch.loss_mask[0].nonzero()[0]] += 1
    assert broken(labels=labels) == [True, False, False, False]
    mask = pack.batch.loss_mask.clone()
    mask[0, pack.batch.cu_seqlens_padded[2] + 1] = 1
    assert broken(loss_mask=mask)[1]
    assert broken(position_ids=torch.arange(256)[None])[2]
    assert broken(tiles=pack.batch.tiles[1:])[3]


def test_a_failed_check_is_told_on_the_page(pack, tokenizer):
    batch = dataclasses.replace(pack.batch, position_ids=torch.arange(256)[None])
    assert "broken:" in render(dataclasses.replace(pack, batch=batch), tokenizer, GEOMETRY)
    assert "broken:" not in render(pack, tokenizer, GEOMETRY)


def test_characters_of_several_tokens_stay_whole(tokenizer):
    text = "\u4f60\u597d, \U0001f642 caf\u00e9 \ufffd!"
    ids = tokenizer.encode(text)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and None in texts
    assert "".join(part or "" for part in texts) == text


def test_a_pack_of_32k_tokens_is_a_page_of_a_few_megabytes(tokenizer):
    text = encode_document("the quick brown fox jumps over the lazy dog 0123456789\n" * 1200, tokenizer)
    encoded = Encoded(text.tokens[:32768], text.loss_mask[:32768])
    batch = collate([encoded], torch.empty(0, 3, 56, 56, dtype=torch.uint8), 32768, 1, tokenizer.pad)
    document = Document("text", 0, sample("text", text), 0, len(encoded.tokens), None)
    html = render(LoadedPack(0, batch, (document,)), tokenizer, GEOMETRY)
    assert len(encoded.tokens) > 20000
    assert len(html) < 40 * len(encoded.tokens)
