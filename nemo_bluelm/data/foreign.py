"""Files of other formats, written once as JSONL by the reader that a source names."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_bluelm.atomic import partial_file
from nemo_bluelm.data.files import Files, ReadError
from nemo_bluelm.errors import UserError
from nemo_bluelm.registry import DATA_SOURCES

FOLDER = "converted"  # in the index's


def converted(files: Sequence[str], reader: str, root: str, index: str, where: str) -> list[str]:
    """The JSONL files that a reader makes of a source's files; one that hasn't changed is not read again.

    A reader is a function ``(file, path)`` that yields a source's records, as ``README.md`` has them, from a binary
    file; it is registered under the source's ``reader`` with ``nemo_bluelm.registry.DATA_SOURCES``, or by an entry
    point of the group ``nemo_bluelm.data_sources``.

    Args:
        files: relative to ``root``, absolute, or URLs.
        index: folder of the index.
        where: the source's key, for messages.

    Returns:
        Absolute paths, in the order of ``files``.

    Raises:
        UserError: no such reader; a file that it can't read; the folder can't be written.
    """
    read, store = DATA_SOURCES.find(reader, f"{where}.reader"), Files(root)
    return [_converted(path, read, reader, store, Path(index).absolute() / FOLDER, where) for path in files]


def _converted(path: str, read, reader: str, store: Files, folder: Path, where: str) -> str:
    try:
        identity = json.dumps(
            [store.absolute(path), list(store.stat(path)), reader, read.__module__, read.__qualname__]
        )
        out = folder / f"{Path(path).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        if out.exists():
            return str(out)
        folder.mkdir(parents=True, exist_ok=True)
        with partial_file(out) as partial:
            with store.open(path) as file, partial.open("w", encoding="utf-8") as lines:
                for record in read(file, path):
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            os.replace(partial, out)
        return str(out)
    except ReadError as error:
        raise UserError(f"{where}: {error}") from error
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}; set data.index to a writable folder") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{where}: the reader {reader} can't read {path}: {type(error).__name__}: {error}") from error
