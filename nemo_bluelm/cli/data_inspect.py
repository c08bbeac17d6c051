"""``nemo-bluelm data inspect``: one pack as a page, just as training would read it."""

import argparse
from itertools import islice
from pathlib import Path

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.cli.recipe_data import open_recipe_data
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe (tiny/sft)")
    parser.add_argument("pack", metavar="PACK", type=_number, help="which pack of the run's order; 0 is the first")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value, as for 'train'")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="where to write the page (default: pack_N.html)")


def run(args: argparse.Namespace) -> int:
    """Load the pack, write the page and print its path.

    Raises:
        UserError: as :func:`open_recipe_data`; the run's data end before this pack; the page can't be written.
    """
    out = args.out or Path(f"pack_{args.pack}.html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it or choose another")
    loader = open_recipe_data(args.recipe, args.overrides, pixels=True)
    planned = next(islice(loader.plan, args.pack, None), None)
    if planned is None:
        raise UserError(f"pack {args.pack} is never read: the sources end after {loader.plan.number} packs")

    from nemo_bluelm.report.pack import render

    pack = loader.load(planned)
    _write(render(pack, loader.tokenizer, loader.geometry), out)
    batch = pack.batch
    print(
        f"{out}: pack {pack.number}, {len(pack.documents)} documents, {int(batch.cu_seqlens[-1]):,} of "
        f"{batch.tokens.numel():,} tokens, {batch.num_tokens:,} targets, {len(batch.tiles)} tiles, "
        f"{len(pack.holes)} bad samples"
    )
    return 0


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a pack, 0 or more")
    if len(text) > 18:  # what islice counts to
        raise argparse.ArgumentTypeError(f"{text:.40} is more than any run reads")
    return int(text)


def _write(page: str, out: Path) -> None:
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror}; choose another --out") from error
