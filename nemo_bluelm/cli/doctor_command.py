"""``nemo-bluelm doctor``: what is installed, what will be used, what is missing and the pip line that adds it."""

import argparse
import json

from nemo_bluelm.cli.arguments import add_json_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if this machine can train, 1 if something it needs is missing or broken."""
    from nemo_bluelm.cli.environment import examine

    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0 if report["ready"] else 1


def _show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title="Installed")
    for name in ("", "version", "state", "for"):
        table.add_column(name)
    colours = {"ok": "green", "missing": "yellow", "broken": "red", "unsupported": "red"}
    for item in report["installed"]:
        if item["required"] and item["state"] == "missing":
            colour = "red"
        else:
            colour = colours[item["state"]]
        note = f"{item['state']}: {item['note']}" if item["note"] else item["state"]
        table.add_row(Text(item["name"]), Text(item["version"] or "-"), Text(note, style=colour), Text(item["for"]))
    console.print(table)

    table = Table(title="Will be used")
    for name in ("for", "what", "because"):
        table.add_column(name)
    for item in report["used"]:
        table.add_row(Text(item["for"]), Text(item["what"]), Text(item["because"]))
    console.print(table)

    for line in report["add"]:
        print(f"{line['for']}:\n  {line['command']}")
    print("This machine can train." if report["ready"] else "This machine cannot train yet: see what is red above.")
