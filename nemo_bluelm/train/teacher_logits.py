"""Store a teacher's likeliest tokens of every document of a recipe's sources, for ``distill.logits``.

Work that is done is kept, shard by shard: the same command goes on where it ended. Several processes may share it, each
with its ``--part``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nemo_bluelm.atomic import new_folder, write_atomically
from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import NO_CHECKPOINTS, load_recipe
from nemo_bluelm.config.schema import DistillConfig, Recipe
from nemo_bluelm.data.plan import Pack, Piece
from nemo_bluelm.data.table import SourceTable
from nemo_bluelm.data.teacher_logits import DTYPES, META_FILE, VERSION, read_meta, shard_folder
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import prepare, quiet
from nemo_bluelm.runtime.run_dir import resolve_checkpoint
from nemo_bluelm.train.packs import open_packs
from nemo_bluelm.train.teachers import check_teacher

TOP_K = 64  # proposed: the paper says nothing


def make(
    teacher: str, recipe: Recipe, out: Path, top_k: int, part: tuple[int, int] = (0, 1), dtype: str = DTYPES[0]
) -> int:
    """Run the teacher over every document once and store its likeliest tokens in ``out``.

    Args:
        teacher: run or checkpoint folder.
        recipe: of the student; its packs tell how long texts are split.
        out: the folder; what it already has of this teacher is kept.
        top_k: tokens to store of each row; at most the vocabulary.
        part: (number, parts) of the shards that this process works on.
        dtype: of the stored log-probabilities, one of :data:`DTYPES`.

    Returns:
        Shards written now.

    Raises:
        UserError: teacher, recipe, data or folder can't be used.
    """
    prepare()
    checkpoint = resolve_checkpoint(teacher, "TEACHER")
    loader = open_packs(recipe)
    check_teacher(replace(recipe, distill=DistillConfig(teacher=teacher)), loader.tokenizer.content)
    vocabulary = recipe.model.language.vocab_size
    if top_k > vocabulary:
        raise UserError(f"--top-k is {top_k}; the vocabulary has {vocabulary} tokens, it must be at most that")
    meta = {"version": VERSION, "teacher": str(checkpoint), "top_k": top_k, "dtype": dtype, "vocabulary": vocabulary}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, {**meta, "settings": loader.plan.index.settings})
        return sum(1 for _ in _shards(checkpoint, loader, out, top_k, part, dtype))
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror}; choose another folder") from error


def _claim(out: Path, meta: dict) -> None:
    """Write what the folder is of, or compare it with what is there."""
    if not (out / META_FILE).exists():
        write_atomically(out / META_FILE, (json.dumps(meta, indent=2) + "\n").encode())
    then = read_meta(out)
    for key, value in json.loads(json.dumps(meta)).items():
        if then[key] != value:
            raise UserError(f"{out} was made with {key} {then[key]}, and now it is {value}; choose another folder")


def _shards(checkpoint: Path, loader, out: Path, top_k: int, part: tuple[int, int], dtype: str) -> Iterator[Path]:
    """Writes this part's missing shards, one after the other."""
    from nemo_bluelm.runtime.single import load_model, single_process_world

    places = {}  # a shard of two sources is written once
    for number, table in enumerate(loader.plan.tables):
        for place, shard in enumerate(table.shards):
            places.setdefault(shard.digest, (number, table, place))
    mine = list(places.items())[part[0] :: part[1]]
    missing = [(digest, place) for digest, place in mine if not shard_folder(out, digest).exists()]
    if not missing:
        return
    with single_process_world():
        model, _, _ = load_model(checkpoint)
        for done, (digest, (number, table, place)) in enumerate(missing, 1):
            folder = shard_folder(out, digest)
            with new_folder(folder) as partial:
                bad = _write(partial, model, loader, number, table, place, top_k, dtype)
            notice = f", {bad} bad samples left out" if bad else ""
            print(f"{table.shards[place].name}  {done}/{len(missing)} shards{notice}", file=sys.stderr, flush=True)
            yield folder


def _write(folder: Path, model, loader, number: int, table: SourceTable, place: int, top_k: int, dtype: str) -> int:
    """One shard's files; returns its bad samples."""
    import torch

    from nemo_bluelm.layers.divergence import likeliest

    pieces = [
        Piece(number, 0, index, int(table.tokens[index]), int(table.tiles[index])) for index in table.pieces_of(place)
    ]
    rows = sum(piece.tokens - 1 for piece in pieces)
    ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.int32, (rows, top_k))
    scores = np.lib.format.open_memmap(folder / "scores.npy", "w+", np.dtype(dtype), (rows, top_k))
    group, device = torch.distributed.group.WORLD, next(model.parameters()).device
    documents, first, bad = [], 0, 0
    for pack in _packs(pieces, loader.plan):
        loaded = loader.load(pack)
        with torch.inference_mode():
            logits = model(loaded.batch.to(device))[0]
            best, log_probabilities = (part.cpu().numpy() for part in likeliest(logits, top_k, 1.0, group))
        for document, start in zip(loaded.documents, loaded.batch.bounds):
            if document.bad is not None:
                bad += 1
                continue
            here, there = slice(start, start + document.length - 1), slice(first, first + document.length - 1)
            ids[there], scores[there] = best[here], log_probabilities[here]
            documents.append((document.sample.offset, document.start, document.length, first))
            first += document.length - 1
    ids.flush()
    scores.flush()
    np.save(folder / "documents.npy", np.array(documents, dtype=np.int64).reshape(-1, 4))
    return bad


def _packs(pieces: list[Piece], plan) -> Iterator[Pack]:
    """The pieces in their order, as many at a time as fit into a pack."""
    packs, room, tiles, count = [], 0, 0, 0
    for piece in pieces:
        length = -(-piece.tokens // plan.alignment) * plan.alignment
        if length > room or piece.tiles > tiles or count == plan.max_documents:
            packs.append([])
            room, tiles, count = plan.sequence_length, plan.max_tiles, 0
        packs[-1].append(piece)
        room, tiles, count = room - length, tiles - piece.tiles, count + 1
    for number, members in enumerate(packs):
        yield Pack(number, tuple(members))


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(number), int(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/make_teacher_logits.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_teacher_logits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", metavar="TEACHER", help="run folder, or one of its checkpoints")
    parser.add_argument("recipe", metavar="RECIPE", help="the student's, for its data")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for distill.logits")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value of the recipe")
    parser.add_argument("--top-k", type=int, default=TOP_K, metavar="K", help=f"tokens stored of each row ({TOP_K})")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"of the stored log-probabilities ({DTYPES[0]})"
    )
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="every Nth shard, from the Ith")
    arguments = parser.parse_args(argv)
    quiet()
    try:
        if arguments.top_k < 1:
            raise UserError(f"--top-k is {arguments.top_k}; it must be 1 or more")
        unneeded = [*NO_CHECKPOINTS, "distill.logits=null"]
        recipe = load_recipe(arguments.recipe, [*unneeded, *arguments.overrides])
        recipe = replace(recipe, distill=DistillConfig())
        check_recipe(recipe, world_size=None)
        made = make(arguments.teacher, recipe, arguments.out, arguments.top_k, arguments.part, arguments.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    print(f"{arguments.out}: {made} shards written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
