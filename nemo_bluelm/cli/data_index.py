"""``nemo-bluelm data index``: read shards once, so that runs know every sample's place, tokens and tiles."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemo_bluelm.cli.arguments import add_json_argument, positive
from nemo_bluelm.cli.model_geometry import add_model_argument, model_geometry
from nemo_bluelm.data.progress import Lines

if TYPE_CHECKING:
    from nemo_bluelm.data.index import Index
    from nemo_bluelm.data.tokenizer import Tokenizer

_ROWS = 50  # a longer table names only shards that lost samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="tars and .jsonl files: paths or globs, relative to --root, or URLs that fsspec opens",
    )
    parser.add_argument("--out", metavar="INDEX", required=True, help="folder of the index; what is in it stays valid")
    parser.add_argument(
        "--root", metavar="DIR", default=".", help="folder or URL that the shards lie below (default .)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="default: tokenizer.json in --root, else beside the first shard"
    )
    add_model_argument(parser)
    parser.add_argument(
        "--workers", metavar="N", type=positive, help="processes (default: as many as are worth starting)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Index the shards and show what is in them.

    Raises:
        UserError: no such shards, tokenizer or model; the index can't be written.
    """
    from nemo_bluelm.data.index import build_index

    geometry = model_geometry(args.model)
    tokenizer = _tokenizer(args)
    clock = _Clock()
    with _progress() as show:
        index = build_index(
            args.shards,
            args.out,
            geometry,
            tokenizer,
            root=args.root,
            workers=args.workers,
            progress=clock.watch(show),
        )
    report = _report(index, clock)
    print(json.dumps(report, indent=2)) if args.json else _show(report)
    return 0


class _Clock:
    """Counts the samples that were new and the seconds that they took."""

    def __init__(self):
        self._start = time.perf_counter()
        self._known: int | None = None
        self.new = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        return self.new / self.seconds

    def watch(self, show: Callable[[int, int, int, float], None]) -> Callable[[int, int, int], None]:
        def progress(done: int, shards: int, samples: int) -> None:
            if self._known is None:
                self._known = samples
            self.new = samples - self._known
            show(done, shards, samples, self.rate)

        return progress


@contextmanager
def _progress() -> Iterator[Callable[[int, int, int, float], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        lines = Lines()
        yield lambda done, shards, samples, rate: lines(done, shards, samples)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, shards: int, samples: int, rate: float) -> None:
            text = f"{samples:,} samples, {rate:,.0f}/s"
            bar.update(task, completed=done, total=shards, description=text)

        yield show


def _tokenizer(args: argparse.Namespace) -> "Tokenizer":
    from nemo_bluelm.data.shards import Files, ReadError, expand, join
    from nemo_bluelm.data.tokenizer import Tokenizer
    from nemo_bluelm.errors import UserError

    if args.tokenizer:
        return Tokenizer.load(args.tokenizer)
    first = join(args.root, expand(args.root, args.shards)[0])
    candidates = [join(args.root, "tokenizer.json"), f"{first.rpartition('/')[0] or '.'}/tokenizer.json"]
    for path in candidates:
        try:
            Files().stat(path)
        except ReadError:
            continue
        return Tokenizer.load(path)
    raise UserError(f"there is no {' and no '.join(dict.fromkeys(candidates))}; name one with --tokenizer")


def _report(index: "Index", clock: _Clock) -> dict:
    shards = [
        {
            "shard": shard.name,
            "samples": len(shard),
            "rejected": shard.rejected,
            "images": shard.num_images,
            "tokens": shard.num_tokens,
            "torn": shard.torn,
        }
        for shard in index.values()
    ]
    totals = {key: sum(shard[key] for shard in shards) for key in ("samples", "rejected", "images", "tokens")}
    return {
        "index": str(index.folder),
        "shards": shards,
        "totals": totals,
        "new_samples": clock.new,
        "seconds": round(clock.seconds, 3),
        "samples_per_second": round(clock.rate, 1),
    }


def _show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    shards, totals = report["shards"], report["totals"]
    few = len(shards) <= _ROWS
    table = Table(title=f"Index {report['index']}", show_footer=True)
    table.add_column("shard" if few else "shards that lost samples", f"{len(shards)} shards")
    for key, total in totals.items():
        table.add_column(key, f"{total:,}", justify="right")
    for shard in shards:
        if few or shard["rejected"] or shard["torn"]:
            table.add_row(shard["shard"], *(f"{shard[key]:,}" for key in totals))
    Console().print(table)
    for shard in shards:
        if shard["torn"]:
            print(f"{shard['shard']}: {shard['torn']}")
    if totals["rejected"]:
        print(f"'nemo-bluelm data quarantine list {report['index']}' tells why samples were rejected.")
    print(
        f"{report['new_samples']:,} new samples in {report['seconds']:.1f} s, "
        f"{report['samples_per_second']:,.0f} samples/s"
    )
