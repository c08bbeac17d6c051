"""Files that are there whole or not at all. Standard library only."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # ends the names of files that are being written, or were when their process was killed


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Where to write what will be ``path``: a place of this process's own, cleared if it wasn't renamed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, or leave it as it is. Raises OSError."""
    with partial_file(path) as partial:
        partial.write_bytes(content)
        os.replace(partial, path)
