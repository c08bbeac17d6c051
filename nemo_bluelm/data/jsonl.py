"""Samples in JSONL: one record a line, its images in files of their own."""

from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

from nemo_bluelm.data.groups import MAX_RECORD, Group, Member, Torn

SUFFIX = ".jsonl"


def scan_jsonl(file: BinaryIO, path: str) -> Iterator[Group]:
    """Each line that isn't blank as a group with the member ``json``; the key is the line's number, from 1.

    Raises:
        Torn: a line is longer than any record may be: the file has no lines.
    """
    offset = 0
    for number in count(1):
        line = file.readline(MAX_RECORD + 1)
        if not line:
            return
        if len(line) > MAX_RECORD:
            raise Torn(path, offset, f"line {number} is longer than {MAX_RECORD >> 20} MiB")
        if line.strip():
            yield Group(str(number), offset, {"json": Member(offset, len(line))})
        offset += len(line)
