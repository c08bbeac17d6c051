"""Records as datatrove documents, and how a pipeline hands them over to the next one or drops them."""

import json
from collections.abc import Iterator

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.stats import Stats


def to_document(shard: str, key: str, record: dict, images: dict[str, list]) -> Document:
    """The text is all the record's text; ``images`` maps names to [file, offset, size]. Pixels stay where they are."""
    metadata = {"shard": shard, "key": key, "record": record, "images": images}
    return Document(text="\n".join(texts(record)), id=f"{shard}/{key}", metadata=metadata)


def texts(record: dict) -> list[str]:
    """All text of a record, in its order: queries, thoughts, answers."""
    if "text" in record:
        return [record["text"]]
    if "document" in record:
        return content_texts(record["document"])
    found = []
    for message in record["messages"]:
        found += [message["thinking"]] if message.get("thinking") else []
        found += content_texts(message["content"])
    return found


def replies(record: dict) -> list[str]:
    """The assistant's answers without thoughts; of a plain text, none."""
    return ["".join(content_texts(m["content"])) for m in record.get("messages", ()) if m["role"] == "assistant"]


def content_texts(content: str | list[dict]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def named(step: PipelineStep, name: str) -> PipelineStep:
    """The step under our name for it, also in its statistics, by which the report finds it."""
    step.name, step.stats = name, Stats(name)
    return step


class Dropped(DiskWriter):
    """What a step removed, as JSON lines ``{shard, key, step, reason, record}``, one file per task."""

    default_output_filename = "${rank}.jsonl"
    name = "dropped"

    def __init__(self, folder: str, step: str):
        super().__init__(folder, compression=None)
        self.step = step
        self.adapter = self._line

    def _line(self, document: Document) -> dict:
        fields = document.metadata
        reason = fields.get("filter_reason", "duplicate")
        return {"shard": fields["shard"], "key": fields["key"], "step": self.step, "reason": reason} | {
            "record": fields["record"]
        }

    def _write(self, document: dict, file_handler, filename: str):
        file_handler.write(json.dumps(document, ensure_ascii=False) + "\n")


class HandOver(PipelineStep):
    """Writes a task's documents for :class:`TakeOver` and passes them on."""

    type = "💽 - WRITER"
    name = "hand over"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = get_datafolder(folder)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        # datatrove's JSONL writer makes no file for a task without documents, and its reader would then give each
        # task another's; the numbers of the signatures would mean other documents.
        with self.folder.open(f"{rank:05d}.jsonl", "w", encoding="utf-8") as file:
            for document in data:
                line = {"text": document.text, "id": document.id, "metadata": document.metadata}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                yield document


class TakeOver(PipelineStep):
    """The documents that the task of the same number handed over, in the same order."""

    type = "📖 - READER"
    name = "take over"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = get_datafolder(folder)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.folder.open(f"{rank:05d}.jsonl", "r", encoding="utf-8") as file:
            for line in file:
                yield Document(**json.loads(line))
