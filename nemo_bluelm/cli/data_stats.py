"""``nemo-bluelm data stats``: what a recipe's mixture delivers, from lengths alone."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from nemo_bluelm.cli.arguments import add_json_argument, add_recipe_arguments, positive
from nemo_bluelm.cli.recipe_data import open_recipe_data

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BAR = 20  # characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--packs", type=positive, default=500, metavar="N", help="packs to plan (default 500)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Plan the packs and print what is in them.

    Raises:
        UserError: as :func:`open_recipe_data`.
    """
    loader = open_recipe_data(args.recipe, args.overrides, pixels=False)

    from nemo_bluelm.report.stats import data_stats

    stats = data_stats(loader.plan, args.packs)
    if args.json:
        print(json.dumps(stats, indent=2))
    else:
        _show(stats)
    return 0


def _show(stats: dict[str, Any]) -> None:
    from rich.console import Console

    # rich would take COLUMNS for the width of a file or pipe.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 80)
    _show_sources(console, stats)
    _show_mixture(console, stats)
    _show_limits(console, stats)
    _show_packs(console, stats)
    _show_lengths(console, stats)


def _show_sources(console: "Console", stats: dict[str, Any]) -> None:
    table = _table("Sources: good samples of the index", "source")
    for name in ("samples", "rejected", "images", "tokens", "tiles", "per record", "epochs"):
        table.add_column(name, justify="right")
    for name, source in stats["sources"].items():
        per_record = f"{source['tokens_per_image_record']:,.0f}" if source["image_records"] else "-"
        numbers = (_short(source[key]) for key in ("samples", "rejected", "images", "tokens", "tiles"))
        table.add_row(name, *numbers, per_record, f"{source['epochs']:.2f}")
    console.print(table)
    console.print("per record: tokens of a record with images; epochs: drawn by the packs below\n", style="dim")
    if notices := [source["unused"] for source in stats["sources"].values() if source["unused"]]:
        console.print("\n".join(notices) + "\n")


def _show_mixture(console: "Console", stats: dict[str, Any]) -> None:
    table = _table(f"Mixture by tokens, {stats['packs']:,} packs", "source")
    for name in ("wanted", "delivered", "off by", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    for name, source in stats["sources"].items():
        wanted, share = source["weight"], source["share"]
        table.add_row(
            name,
            f"{wanted:.2%}",
            f"{share:.2%}",
            f"{share - wanted:+.2%}",
            _short(source["delivered"]["tokens"]),
            _bar(share),
        )
    table.add_section()
    records = stats["records"]
    for what in ("text", "image"):
        share, tokens = records[f"{what}_share"], records[f"{what}_tokens"]
        table.add_row(f"{what} records", "", f"{share:.2%}", "", _short(tokens), _bar(share))
    console.print(table)
    if stats["packs"] < stats["packs_wanted"]:
        console.print(f"every source reached its max_epochs after {stats['packs']:,} packs\n")


def _show_limits(console: "Console", stats: dict[str, Any]) -> None:
    columns = ("split", "truncated", "dropped", "excluded")
    if not any(source[name] for source in stats["sources"].values() for name in columns):
        console.print("No sample is split, truncated, dropped or in quarantine.\n")
        return
    table = _table("Samples that do not go in whole", "source")
    for name in ("samples", "split", "truncated", "dropped", "in quarantine"):
        table.add_column(name, justify="right")
    for name, source in stats["sources"].items():
        table.add_row(name, *(_short(source[key]) for key in ("samples", *columns)))
    console.print(table)


def _show_packs(console: "Console", stats: dict[str, Any]) -> None:
    fill, capacity = stats["fill"], max(1, stats["fill"]["capacity"])
    table = _table(f"Packs of {stats['sequence_length']:,} tokens", "")
    table.show_header = False
    table.add_column("", justify="right")
    table.add_column("", no_wrap=True)
    of_capacity = (
        ("sequence fill", fill["tokens"]),
        (f"alignment to {stats['alignment']}", fill["alignment_padding"]),
        ("unused tail", fill["tail_padding"]),
    )
    for name, tokens in of_capacity:
        table.add_row(name, f"{tokens / capacity:.2%}", f"{_short(tokens)} of {_short(capacity)} tokens")
    tiles = stats["tiles_per_pack"]
    table.add_row(
        "tiles in a pack",
        f"{tiles['mean']:.1f}",
        f"from {tiles['min']} to {tiles['max']}, median {tiles['median']:.0f}, "
        f"95 % {tiles['p95']:.0f}, cap {stats['max_tiles']}",
    )
    documents = stats["documents_per_pack"]
    table.add_row(
        "documents in a pack",
        f"{documents['mean']:.1f}",
        f"from {documents['min']} to {documents['max']}, median {documents['median']:.0f}",
    )
    planning = stats["planning"]
    table.add_row("planned", f"{planning['samples_per_second']:,.0f}", "samples/s")
    console.print(table)


def _show_lengths(console: "Console", stats: dict[str, Any]) -> None:
    table = _table("Lengths of the documents in these packs", "tokens")
    table.columns[0].justify = "right"
    table.add_column("documents", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("of all tokens", justify="right")
    most = max((bin["documents"] for bin in stats["lengths"]), default=1)
    for bin in stats["lengths"]:
        share = bin["tokens"] / max(1, stats["fill"]["tokens"])
        last = bin["to"] - 1
        span = f"{bin['from']:,} to {last:,}" if last > bin["from"] else f"{last:,}"
        table.add_row(span, f"{bin['documents']:,}", _bar(bin["documents"] / most), f"{share:.1%}")
    console.print(table)


def _table(title: str, first: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first, overflow="fold")
    return table


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(share * _BAR * 8)
    return "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def _short(number: int) -> str:
    """Digits up to a million, then four significant ones."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"
