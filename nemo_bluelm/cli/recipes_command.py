"""``nemo-bluelm recipes``: the packaged recipes, pipelines and ablations, each with its first comment line."""

import argparse
import json

from nemo_bluelm import resources
from nemo_bluelm.cli.arguments import add_json_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    names = [name for kind in ("pipeline", None, "ablation") for name in resources.packaged_recipes(kind)]
    rows = [{"name": name, "about": _about(name)} for name in names]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['about']}")
    return 0


def _about(name: str) -> str:
    first = (resources.recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
