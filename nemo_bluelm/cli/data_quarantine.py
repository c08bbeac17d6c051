"""``nemo-bluelm data quarantine``: the bad samples of an index, and leaving them out of later runs."""

import argparse
import dataclasses
import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bluelm.cli.arguments import add_json_argument
from nemo_bluelm.errors import UserError

if TYPE_CHECKING:
    from nemo_bluelm.data.ledger import Ledger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "list the bad samples and why they are bad"
    _action(actions, "list", text)
    text = "leave out, from now on, the samples that failed to read or decode in a run"
    _action(actions, "apply", text)
    text = "take the samples that 'apply' left out back in: after their shard was mended, or to resume an older run"
    _action(actions, "clear", text)


def run(args: argparse.Namespace) -> int:
    """List, apply or clear the ledger.

    Raises:
        UserError: not an index; its ledger can't be read or written.
    """
    return {"list": _list, "apply": _apply, "clear": _clear}[args.action](args)


def _action(actions, name: str, text: str) -> None:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("index", metavar="INDEX", type=Path, help="folder of an index")
    add_json_argument(parser)


def _list(args: argparse.Namespace) -> int:
    ledger = _ledger(args.index)
    entries, excluded = ledger.entries(), ledger.excluded()
    rows = [dataclasses.asdict(e) | {"left_out": _left_out(e, excluded)} for e in entries]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"{args.index} has no bad samples.")
        return 0

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Quarantine of {args.index}")
    for name in ("shard", "key", "offset", "met by", "left out", "why"):
        table.add_column(name, justify="right" if name == "offset" else "left", overflow="fold")
    for row in rows:
        left_out = "yes" if row["left_out"] else "no"
        cells = (row["shard"], row["key"], f"{row['offset']:,}", row["stage"], left_out, row["error"])
        table.add_row(*map(Text, cells))
    Console().print(table)
    return 0


def _apply(args: argparse.Namespace) -> int:
    ledger = _ledger(args.index)
    before = len(ledger.excluded())
    total = ledger.apply()
    if args.json:
        print(json.dumps({"index": str(args.index), "left_out": total, "new": total - before}))
    else:
        print(f"{_samples(total)} will be left out from now on, {total - before} more than before.")
        if total > before:
            print(
                "Runs that started before refuse to resume with this index, since their data changed. Start new ones, "
                f"or take the samples back in: nemo-bluelm data quarantine clear {args.index}"
            )
    return 0


def _clear(args: argparse.Namespace) -> int:
    total = _ledger(args.index).clear()
    if args.json:
        print(json.dumps({"index": str(args.index), "taken_back": total}))
    else:
        print(f"{_samples(total)} will be taken back in from now on.")
    return 0


def _samples(count: int) -> str:
    return f"{count} sample" if count == 1 else f"{count} samples"


def _left_out(entry, excluded: set[tuple[str, int]]) -> bool:
    """A sample that the index rejected was never in."""
    return entry.stage == "index" or (entry.shard, entry.offset) in excluded


def _ledger(folder: Path) -> "Ledger":
    from nemo_bluelm.data.indexing import LEDGER
    from nemo_bluelm.data.ledger import Ledger

    if not glob.glob("*.arrow", root_dir=folder):
        raise UserError(f"{folder} is not an index; give the folder that 'nemo-bluelm data index --out' or a run made")
    return Ledger(folder / LEDGER)
