"""What a checkpoint's files were when it was published, so that one that is torn or changed is known. No torch."""

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

CHECKSUMS_FILE = "checksums.json"  # in a checkpoint, beside its weights
_CHUNK = 8 * 2**20  # bytes; zlib lets other threads run meanwhile
_THREADS = 8


class Checksum(NamedTuple):
    """Size and CRC-32 of a file. A CRC finds what disks and crashes do; it is no defence against intent."""

    bytes: int
    crc32: int


def checksum(file: Path) -> Checksum:
    """Read a file through. Raises OSError."""
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Checksum(size, crc)


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, Checksum]:
    """Those of some files, by their path in ``folder``. Raises OSError."""
    with ThreadPoolExecutor(_THREADS) as threads:
        files = list(files)
        return {str(file.relative_to(folder)): found for file, found in zip(files, threads.map(checksum, files))}


def files_in(folder: Path) -> set[Path]:
    """All files of a folder and those below it."""
    return {file for file in folder.rglob("*") if file.is_file()}


def write_checksums(folder: Path, found: dict[str, Checksum]) -> None:
    """Write ``CHECKSUMS_FILE``. Raises OSError."""
    rows = {name: found[name]._asdict() for name in sorted(found)}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(rows, indent=1) + "\n")


def find_damage(checkpoint: Path, share: int = 0, shares: int = 1, names: Optional[set[str]] = None) -> Optional[str]:
    """What is wrong with a checkpoint, None if nothing is; one without checksums can't be told and passes.

    Args:
        share, shares: read one of so many parts of the files only, of about the same bytes each.
        names: read these files only; None for all.
    """
    try:
        content = (checkpoint / CHECKSUMS_FILE).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"{CHECKSUMS_FILE} can't be read ({type(error).__name__})"
    try:
        expected = {name: Checksum(**row) for name, row in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is cut off or overwritten"
    wanted = [name for name in expected if names is None or name in names]
    mine = sorted(wanted, key=lambda name: (-expected[name].bytes, name))[share::shares]
    with ThreadPoolExecutor(_THREADS) as threads:
        return next(
            filter(None, threads.map(lambda name: _difference(checkpoint / name, name, expected[name]), mine)), None
        )


def _difference(file: Path, name: str, expected: Checksum) -> Optional[str]:
    try:
        if (size := file.stat().st_size) != expected.bytes:
            return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
        return None if checksum(file) == expected else f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"
