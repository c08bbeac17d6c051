"""``nemo-bluelm report``: what happened in runs, as one page."""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run folder; folder of runs (a pipeline's, a quickstart's); result folder of eval. Several are compared",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the first folder)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the charts as PNG files, too")
    parser.add_argument("--json", action="store_true", help="print the numbers instead of writing a page")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its place; the exit code.

    Raises:
        UserError: a folder without runs, a file that can't be read or written.
    """
    from nemo_bluelm.report.run_page import summary, write_report
    from nemo_bluelm.report.runs import find_runs

    found = find_runs(args.runs)
    if args.json:
        print(json.dumps(summary(found), indent=1, ensure_ascii=False, default=str))
        return 0
    out = args.out or args.runs[0] / "report.html"
    write_report(found, out, args.png)
    print(out)
    if args.png:
        print(args.png, file=sys.stderr)
    return 0
