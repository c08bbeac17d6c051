"""Shared pieces: texts, images and shards with planted faults, and a recipe around them."""

import io
import json
import random
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from nemo_bluelm.data.curate.run import run
from nemo_bluelm.data.curate.schema import load_recipe
from nemo_bluelm.data.records import read_records
from nemo_bluelm.data.writer import RawSample, write_shard

NOUNS = "river garden engine bridge window teacher market village forest letter signal planet harbor kitchen mountain"
VERBS = "carries follows reaches improves describes protects measures repeats watches explains builds paints moves"
ADJECTIVES = "quiet narrow modern golden simple early distant careful heavy gentle strange public second royal wooden"
HAN = "天地人山水火木金土日月星云雨风花草树鸟鱼牛马羊书画琴棋诗词歌城市村镇道路桥船车门窗春夏秋冬东南西北中外大小多少"


def english(seed: int, sentences: int = 12) -> str:
    """Made-up English with its frequent words; another for each seed."""
    rng = random.Random(seed)

    def pick(words: str) -> str:
        return rng.choice(words.split())

    def sentence() -> str:
        return (
            f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)} that the {pick(NOUNS)} of this "
            f"{pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} in {rng.randint(2, 99)} days."
        )

    return " ".join(sentence() for _ in range(sentences))


def chinese(seed: int, sentences: int = 10) -> str:
    rng = random.Random(seed)
    return "".join(
        "".join(rng.choices(HAN, k=9)) + "的是" + "".join(rng.choices(HAN, k=6)) + "了。" for _ in range(sentences)
    )


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Smooth random colours: no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def asked(key: str, image: bytes, answer: str, question: str = "What is it?", tags=()) -> RawSample:
    query = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    record = {"messages": [query, {"role": "assistant", "content": answer}], "images": ["0.png"], "tags": list(tags)}
    return RawSample(key, record, {"0.png": image})


def text(key: str, content: str, *tags: str) -> RawSample:
    return RawSample(key, {"text": content} | ({"tags": list(tags)} if tags else {}))


class Curation:
    """A folder with input shards and a recipe over them."""

    def __init__(self, folder: Path, steps: dict, **recipe):
        self.folder, self.out = folder, folder / "out"
        (folder / "in").mkdir(exist_ok=True)
        content = {"name": "clean", "output": str(self.out), "steps": steps}
        content |= {"input": {"root": str(folder / "in"), "shards": ["*.tar"]}} | recipe
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(content, sort_keys=False))

    def add(self, *samples: RawSample, name: str = "a.tar") -> "Curation":
        write_shard(self.folder / "in" / name, samples)
        return self

    def run(self, *overrides: str) -> str:
        return run(load_recipe(self.recipe, overrides))

    def kept(self) -> dict:
        """{key: record} of all output shards, read as training reads them."""
        return {key: record for shard in sorted(self.out.glob("*.tar")) for key, record, _ in read_records(shard)}

    def dropped(self) -> dict[str, tuple[str, str]]:
        """{key: (step, reason)}."""
        lines = [line for file in sorted(self.out.glob("dropped/*/*.jsonl")) for line in file.read_text().splitlines()]
        return {row["key"]: (row["step"], row["reason"]) for row in map(json.loads, lines)}

    def report(self) -> dict:
        return json.loads((self.out / "report.json").read_text())
