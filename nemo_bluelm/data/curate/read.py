"""Read records from WebDataset tars and JSONL files, and look at their images."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from nemo_bluelm.data.curate.documents import Dropped, texts, to_document
from nemo_bluelm.data.curate.near_images import difference_hash
from nemo_bluelm.data.files import Files, ReadError
from nemo_bluelm.data.groups import Group, Torn
from nemo_bluelm.data.headers import BadImage, read_header
from nemo_bluelm.data.records import find_images, load_record
from nemo_bluelm.data.shards import scan
from nemo_bluelm.errors import UserError


class ReadRecords(PipelineStep):
    """The records of this task's share of the shards; samples that are none are dropped and counted."""

    type = "📖 - READER"
    name = "read"

    def __init__(self, root: str, shards: list[str], dropped: Dropped | None):
        super().__init__()
        self.root, self.shards, self.dropped = root, shards, dropped

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        files = Files(self.root)
        for shard in self.shards[rank::world_size]:
            for document in read_shard(files, shard):
                self.stat_update("total")
                reason = document.metadata.get("filter_reason")
                if reason is None:
                    self.stat_update("forwarded")
                    yield document
                    continue
                self.stat_update("dropped", f"dropped_{reason}")
                if self.dropped:
                    self.dropped.write(document, rank)
        if self.dropped:
            self.dropped.close()


def read_shard(files: Files, shard: str) -> Iterator[Document]:
    """Every sample of a shard; what is no record, and the torn end of a shard, has a ``filter_reason``.

    Raises:
        ReadError: the shard can't be read.
    """
    try:
        for group in scan(shard, files):
            yield _document(files, shard, group)
    except Torn as error:
        yield _unreadable(shard, f"byte {error.offset}", "torn_shard", str(error))


def _document(files: Files, shard: str, group: Group) -> Document:
    reason = "bad_record"
    try:
        record, data = load_record(partial(files.read, shard), group)
        fields = json.loads(data)
        _check(fields)
        reason = "missing_image"
        images = find_images(files, shard, group, record)
    except UserError as error:
        return _unreadable(shard, group.key, reason, str(error))
    places = {image.name: [image.file, *image.member] for image in images}
    return to_document(shard, record.id or group.key, fields, places)


def _check(fields: dict) -> None:
    try:
        "".join(texts(fields)).encode()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("messages or document have no such form as the chat format asks for") from error
    except UnicodeEncodeError as error:
        raise UserError("its text is no Unicode") from error


def _unreadable(shard: str, key: str, reason: str, why: str) -> Document:
    metadata = {"shard": shard, "key": key, "record": why, "filter_reason": reason}
    return Document(text=why, id=f"{shard}/{key}", metadata=metadata)


class LookAtImages(BaseFilter):
    """Notes of each image what later steps must know: ``size``, and where wanted ``digest`` and ``hash``.

    Only ``hash`` decodes pixels. Drops records with an image that can't be read.
    """

    name = "look at images"

    def __init__(self, root: str, wanted: frozenset[str], dropped: Dropped | None):
        super().__init__(dropped)
        self.root, self.wanted = root, wanted

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.files = Files(self.root)  # here, because open files can't be sent to another process
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        try:
            doc.metadata["seen"] = [self._look(self.files.read(*place)) for place in doc.metadata["images"].values()]
        except ReadError:
            return False, "missing_image"
        except BadImage:
            return False, "bad_image"
        return True

    def _look(self, data: bytes) -> dict:
        header = read_header(data)
        seen = {"size": [header.width, header.height]}
        if "digest" in self.wanted:
            seen["digest"] = hashlib.sha256(data).hexdigest()
        if "hash" in self.wanted:
            seen["hash"] = difference_hash(data).hex()
        return seen
