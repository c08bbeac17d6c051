"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from nemo_bluelm.errors import UserError

PARTIAL = ".partial"  # ends the names of what is being written, or was when its process was killed


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


@contextlib.contextmanager
def cleared_on_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs inside by an exception, as Ctrl-C does, unless somebody else listens to it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Where to make what will be the folder ``path``: a place of this process's own, cleared if it wasn't renamed.

    Raises:
        UserError: ``path`` exists and isn't an empty folder; it or what it will hold can't be written.
    """
    whole = path.resolve()
    partial = whole.parent / f".{whole.name}.{os.getpid()}{PARTIAL}"
    with cleared_on_sigterm():
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"{path} exists and is not an empty folder; remove it or choose another")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that had this number and was killed
            partial.mkdir(parents=True)
            yield partial
            os.replace(partial, whole)
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror or error}; choose another folder") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
