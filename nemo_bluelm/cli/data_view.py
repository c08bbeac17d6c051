"""``nemo-bluelm data view``: one picture of the tiles that an image becomes."""

import argparse
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.cli.arguments import add_json_argument
from nemo_bluelm.cli.model_geometry import add_model_argument, model_geometry
from nemo_bluelm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", type=Path, help="an image file")
    parser.add_argument(
        "--out", metavar="FILE.png", type=Path, help="where to write the picture (default: NAME_anyres.png, here)"
    )
    add_model_argument(parser)
    parser.add_argument("--backend", metavar="NAME", default="torch", help="what decodes: torch (default), pil or dali")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the picture, print its path and its numbers.

    Raises:
        UserError: the image can't be read or would be refused in training, an unknown model or backend, or the picture
            can't be written.
    """
    out = args.out or Path(f"{args.image.stem}_anyres.png")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; name it {out.with_suffix('.png').name}")
    geometry = model_geometry(args.model)
    try:
        data = args.image.read_bytes()
    except OSError as error:
        raise UserError(f"{args.image} can't be read: {error.strerror}") from error

    from nemo_bluelm.data.decode import get_backend
    from nemo_bluelm.report.anyres import draw, view

    result = view(args.image.name, data, geometry, get_backend(args.backend))
    _write(draw(result), out)
    facts = result.facts() | {"model": args.model, "out": str(out)}
    if args.json:
        print(json.dumps(facts))
    else:
        cols, rows = facts["grid"]
        print(
            f"{out}: {facts['width']} x {facts['height']} px, grid {cols} x {rows} (columns x rows), "
            f"{facts['tiles']} tile{'s' * (facts['tiles'] > 1)}, {facts['tokens']:,} tokens"
        )
    return 0


def _write(picture: "Image", out: Path) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    try:
        write_atomically(out, file.getvalue())
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror}; choose another --out") from error
