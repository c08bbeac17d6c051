"""What the training benchmarks share on the command line: options, the corpus, the table at the end."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.errors import UserError

if TYPE_CHECKING:  # it brings omegaconf, which --help needn't wait for
    from nemo_bluelm.config.schema import Recipe


def natural(text: str) -> int:
    """argparse type: a whole number of 0 or more."""
    return 0 if text == "0" else positive(text)


def add_measure_arguments(parser: argparse.ArgumentParser, steps: int = 12, warmup: int = 5) -> None:
    """``--steps``, ``--warmup``, ``--corpus`` and ``--json``."""
    parser.add_argument("--steps", type=positive, default=steps, metavar="N", help=f"steps that count ({steps})")
    parser.add_argument("--warmup", type=natural, default=warmup, metavar="N", help=f"steps before them ({warmup})")
    parser.add_argument("--corpus", metavar="DIR", help="data.root; made there where it does not exist")
    add_json_file(parser)


def add_json_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result there; - is the standard output")


def check_files(args: argparse.Namespace, *names: str) -> None:
    """Refuse files that could not be written at the end of a long measurement.

    Raises:
        UserError: a folder that does not exist.
    """
    for name in names:
        value = getattr(args, name)
        if value and value != "-" and not Path(value).absolute().parent.is_dir():
            raise UserError(f"--{name} {value}: there is no folder {Path(value).parent}; make it or name another")


def refuse_ranks() -> None:
    """
    Raises:
        UserError: this process is a rank of a launcher's job; each would start a measurement of its own.
    """
    if "RANK" in os.environ:
        raise UserError(
            f"this process is rank {os.environ['RANK']} of a launcher's job; start one process, with --nproc for "
            "several GPUs, or unset RANK"
        )


def bench_recipe(args: argparse.Namespace, world_size: int) -> "Recipe":
    """The recipe that is measured, its corpus in place.

    A corpus that is missing is made where ``--corpus`` says, or where the packaged recipes look for it.

    Raises:
        UserError: as ``load_recipe``, ``check_recipe`` and ``make_corpus``.
    """
    from nemo_bluelm.bench.corpus import DEFAULT, LENGTHS, make_corpus
    from nemo_bluelm.config.checks import check_machine, check_recipe
    from nemo_bluelm.config.compose import load_recipe

    root = [f"data.root={quoted(args.corpus)}"] if args.corpus else []
    recipe = load_recipe(args.recipe, [*args.overrides, *root])
    check_recipe(recipe, world_size)
    check_machine(recipe)
    folder = Path(recipe.data.root)
    if not folder.exists() and (args.corpus or folder == DEFAULT):
        print(f"making the corpus in {folder}", file=sys.stderr)
        make_corpus(folder, {*LENGTHS, recipe.data.sequence_length})
    return recipe


def quoted(value: str) -> str:
    """A value in the grammar of overrides, whatever characters it has."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def save(args: argparse.Namespace, report: dict) -> None:
    """Write the report where ``--json`` says.

    Raises:
        UserError: it can't be written.
    """
    text = json.dumps(report, indent=2)
    if args.json == "-":
        print(text)
    elif args.json:
        try:
            Path(args.json).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json} can't be written: {error.strerror}") from error


def print_rows(title: str, rows: list[dict], unit: str = "tokens") -> None:
    """A table on stderr, so that ``--json -`` has the standard output for itself."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for head in ("step, ms", "min - max", f"{unit}/s", "TFLOP/s a GPU", "MFU", "peak GiB", "waits for data"):
        table.add_column(head, justify="right")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], row["error"])
            continue
        seconds, memory, wait = row["step_seconds"], row["memory"], row.get("data_wait")
        table.add_row(
            row["name"],
            f"{1000 * seconds['median']:.1f}",
            f"{1000 * seconds['min']:.1f} - {1000 * seconds['max']:.1f}",
            f"{row[f'{unit}_per_second']:,.0f}" if row[f"{unit}_per_second"] >= 100 else f"{row[f'{unit}_per_second']}",
            f"{row['tflops']:.4g}",
            "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
            "" if memory is None else f"{memory['allocated_gib']:.1f}",
            "" if wait is None else f"{100 * wait['fraction']:.1f}%",
        )
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table)
