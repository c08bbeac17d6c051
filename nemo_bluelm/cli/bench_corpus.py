"""``nemo-bluelm bench corpus``: make the corpus of recipes/bench, for a machine that can't, or in another size."""

import argparse
import json
from pathlib import Path

from nemo_bluelm.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="new folder to make it in; data.root or --corpus of the others")
    parser.add_argument(
        "--lengths", type=_lengths, metavar="A,B", help="tokens of a text, one set each (4096,8192,32768)"
    )
    parser.add_argument("--text-tokens", type=positive, metavar="N", help="tokens of each set (393,216)")
    parser.add_argument("--images", type=positive, metavar="N", help="photos, 350 KB each (12)")
    parser.add_argument("--vocab-size", type=positive, metavar="N", help="of the tokenizer (16,384)")


def run(args: argparse.Namespace) -> int:
    """Make it and print what it holds.

    Raises:
        UserError: as ``make_corpus``.
    """
    from nemo_bluelm.bench.corpus import make_corpus

    names = ("lengths", "text_tokens", "images", "vocab_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    print(json.dumps(make_corpus(Path(args.folder), **given)))
    return 0


def _lengths(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
