"""Write the records that are left as WebDataset shards, and count their tags."""

import json
import os
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep

from nemo_bluelm.data.curate.words import words
from nemo_bluelm.data.files import Files
from nemo_bluelm.data.writer import RawSample, write_shard


class WriteShards(PipelineStep):
    """Writes ``NAME-TASK-NUMBER.tar``, each there whole or not at all, then ``counts/TASK.json``."""

    type = "💽 - WRITER"
    name = "write"

    def __init__(self, root: str, output: str, counts: str, name: str, samples_per_shard: int):
        super().__init__()
        self.root, self.output, self.counts = root, get_datafolder(output), get_datafolder(counts)
        self.shard_name, self.samples_per_shard = name, samples_per_shard

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        files, names, tags = Files(self.root), [], Counter()
        documents = self._count(iter(data), tags)
        while (first := next(documents, None)) is not None:
            name = f"{self.shard_name}-{rank:05d}-{len(names):04d}.tar"
            shard = chain([first], islice(documents, self.samples_per_shard - 1))
            _publish(self.output, name, _samples(files, shard))
            names.append(name)
        counts = {"shards": names, "tags": {json.dumps(list(key)): value for key, value in sorted(tags.items())}}
        with self.counts.open(f"{rank:05d}.json", "w") as file:
            json.dump(counts, file)

    def _count(self, documents: Iterator[Document], tags: Counter) -> Iterator[Document]:
        for document in documents:
            self.stat_update("total")
            key = tuple(sorted(set(document.metadata["record"].get("tags", ()))))
            records, length = tags.get(key, (0, 0))
            tags[key] = (records + 1, length + len(words(document.text)))
            yield document


def _samples(files: Files, documents: Iterator[Document]) -> Iterator[RawSample]:
    taken: Counter = Counter()
    for document in documents:
        fields = document.metadata
        record, images = dict(fields["record"]), {}
        for number, (name, place) in enumerate(fields["images"].items()):
            images[f"{number}{posixpath.splitext(name)[1].lower() or '.img'}"] = files.read(*place)
        if images:
            record["images"] = list(images)
        if "text" in record:
            record["text"] = document.text  # a filter may have removed lines
        # Shards of the input may use a key each, and a key may hold what ends one in a tar.
        key = re.sub(r"[^\w/-]", "_", fields["key"])
        taken[key] += 1
        yield RawSample(key if taken[key] == 1 else f"{key}-{taken[key]}", record, images)


def _publish(folder: DataFolder, name: str, samples: Iterator[RawSample]) -> None:
    target = folder.resolve_paths(name)
    local = folder.is_local()
    if local:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=os.path.dirname(target) if local else None) as scratch:
        shard = Path(scratch) / name
        write_shard(shard, samples)
        if local:
            os.replace(shard, target)
        else:
            folder.put_file(str(shard), name)
