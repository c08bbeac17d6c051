"""The AnyRes geometry of a packaged model, for commands on images and shards that need no recipe."""

import argparse
import difflib

from nemo_bluelm import resources
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

DEFAULT = "bluelm_2_5_3b"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        default=DEFAULT,
        help=f"whose tiles and tokens to count: {DEFAULT} (default), tiny, ...",
    )


def model_geometry(name: str) -> Geometry:
    """The geometry of ``conf/model/NAME.yaml``.

    Raises:
        UserError: no such model.
    """
    import yaml

    folder = resources.conf_dir() / "model"
    models = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in models:
        close = difflib.get_close_matches(name, models, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--model {name}: no such model; {hint}there are {', '.join(models)}")
    block = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    return Geometry(**block.get("geometry", {}))
