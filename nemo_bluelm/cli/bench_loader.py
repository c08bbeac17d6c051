"""``nemo-bluelm bench loader``: what decoding costs here, beside the tools that people know."""

import argparse
import json
import os
import sys
from pathlib import Path

from nemo_bluelm.cli.arguments import add_json_argument, positive
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backends", default="torch,pil,dali", metavar="A,B", help="which ones (default: torch,pil,dali)"
    )
    parser.add_argument("--images", type=positive, default=16, metavar="N", help="how many images (default: 16)")
    parser.add_argument("--folder", metavar="DIR", help="take the JPEG files of DIR instead of made ones")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where the tiles shall be")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), metavar="N", help="for images a second")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="how often (default: 5)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result to a file")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        UserError: no backend, an unknown or missing one, no CUDA device, no images, or a file that can't be written.
    """
    from nemo_bluelm.bench.images import make_images, read_images
    from nemo_bluelm.bench.loader import bench_cpu, bench_gpu

    def say(words: str) -> None:
        if sys.stderr.isatty():
            print(words, file=sys.stderr)

    names = list(dict.fromkeys(name.strip() for name in args.backends.split(",") if name.strip()))
    if not names:
        raise UserError(f"--backends {args.backends!r} names none; give torch, pil, dali or several of them")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UserError(
            f"--out {args.out}: the folder {Path(args.out).parent} does not exist; make it or choose another"
        )
    images = read_images(args.folder, args.images) if args.folder else make_images(args.images)
    bench = bench_gpu if args.device == "gpu" else bench_cpu
    report = bench(names, images, args.rounds, args.threads, say)
    text = json.dumps(report, indent=2)
    if args.json:
        print(text)
    else:
        _show(report)
    if args.out:
        try:
            Path(args.out).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--out {args.out} can't be written: {error.strerror}") from error
    return 0


def _show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    settings, peers = report["settings"], list(report["paths"][0].get("ratio", {}))
    console = Console()
    table = Table(title=f"{settings['images']} images to tiles of {settings['geometry']['tile']} pixels")
    table.add_column("path")
    heads = ["CPU ms/image", "min - max", f"images/s, {settings['threads']} threads", "max, mean off Pillow"]
    for head in [*heads[:2], *(f"x {peer}" for peer in peers), *heads[2:]]:
        table.add_column(head, justify="right")
    for row in report["paths"]:
        cpu, parity = row["cpu_ms"], row.get("parity")
        table.add_row(
            row["name"],
            f"{cpu['median']:.1f}",
            f"{cpu['min']:.1f} - {cpu['max']:.1f}",
            *(f"{row['ratio'][peer]:.2f}" for peer in peers),
            f"{row['images_per_s']:.0f}",
            f"{parity['max']}, {parity['mean']:.3f}" if parity else "",
        )
    console.print(table)
    machine = report["machine"]
    console.print(", ".join([machine["cpu"], f"{machine['cores']} cores", *filter(None, [machine.get("gpu")])]))
    for note in report["notes"]:
        console.print(f"note: {note}")
