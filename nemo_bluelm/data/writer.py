"""Write WebDataset shards in the layout that the index reads."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RawSample:
    """A sample as it goes into a shard: its record (JSON fields) and its image files by extension (``0.png``)."""

    key: str
    record: dict
    images: dict[str, bytes] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """All its text, to train a tokenizer on."""
        if "text" in self.record:
            return [self.record["text"]]
        texts = []
        for message in self.record["messages"]:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
            texts += parts + ([message["thinking"]] if "thinking" in message else [])
        return texts


def question_record(question: str, answer: str, thought: str | None, image: str | None, tags: Sequence[str]) -> dict:
    """A conversation of one turn, with one image before the question or none."""
    reply = {"role": "assistant", "content": answer} | ({} if thought is None else {"thinking": thought})
    if image is None:
        return {"messages": [{"role": "user", "content": question}, reply], "tags": list(tags)}
    query = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return {"messages": [query, reply], "images": [image], "tags": list(tags)}


def write_split(folder: Path, name: str, samples: Sequence[RawSample], shards: int) -> None:
    """Deal the samples to ``NAME-0000.tar``, ``NAME-0001.tar``, ..."""
    for shard in range(shards):
        write_shard(folder / f"{name}-{shard:04d}.tar", samples[shard::shards])


def write_shard(path: Path, samples: Iterable[RawSample]) -> None:
    """Members carry no time or owner, so that the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            record = json.dumps(sample.record, ensure_ascii=False).encode()
            for extension, data in {"json": record, **sample.images}.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
