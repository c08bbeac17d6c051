"""A data source: questions and answers in CSV files with the columns question and answer."""

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO


def questions(file: BinaryIO, path: str) -> Iterator[dict[str, Any]]:
    """A conversation for each row."""
    for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
        yield {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "tags": ["csv"],
        }
