"""``nemo-bluelm generate``: ask a checkpoint, once or in a chat."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

from nemo_bluelm.cli.arguments import add_json_argument, positive
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask; without it a chat begins, on a terminal")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="stands before the prompt; may be given again"
    )
    think = parser.add_mutually_exclusive_group()
    for flag, value, what in (
        ("--think", True, "think first"),
        ("--no-think", False, "answer at once"),
        ("--think-auto", None, "let the model decide (the default)"),
    ):
        think.add_argument(flag, dest="think", action="store_const", const=value, default=None, help=what)
    parser.add_argument("--think-budget", type=int, metavar="N", help="tokens of a thought at most")
    parser.add_argument("--closing-text", default="", metavar="TEXT", help="ends a thought that the budget closes")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="of a reply (512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share of probability to choose from (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="tokens to choose from; 0 all (0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="of tokens seen before (1)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given again"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    parser.add_argument(
        "--tensor",
        type=positive,
        default=1,
        metavar="N",
        help="processes that the model is split over, one per GPU (1)",
    )
    parser.add_argument("--show-thought", action="store_true", help="print the thought where there is no terminal too")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Answer and return the exit code.

    Raises:
        UserError: a mistake in the arguments, or an image that can't be read.
    """
    from nemo_bluelm.cli.chat import Chat, Printer, read_image
    from nemo_bluelm.generate.request import Prompt, Sampling
    from nemo_bluelm.runtime.environment import Launch
    from nemo_bluelm.runtime.run_dir import RECIPE_FILE, resolve_checkpoint

    if args.think is False and args.think_budget is not None:
        raise UserError("--think-budget has no thought to limit with --no-think; leave one of them out")
    if args.think_budget is not None and args.think_budget > max(0, args.max_new_tokens - 3):
        raise UserError(
            f"--think-budget {args.think_budget} leaves no room for <think>, </think> and an answer in "
            f"--max-new-tokens {args.max_new_tokens}; raise that"
        )
    place = Launch.from_environment() if args.tensor > 1 else Launch()
    if args.tensor > 1 and args.prompt is None:
        raise UserError(f"--tensor {args.tensor}: a chat has one process; give --prompt TEXT")
    if args.prompt is None and (args.json or not sys.stdin.isatty()):
        raise UserError("there is nothing to answer; give --prompt TEXT, or start a chat on a terminal without --json")
    checkpoint = resolve_checkpoint(args.checkpoint, "CHECKPOINT")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "think_budget", "closing_text")
    sampling = Sampling(**{name: getattr(args, name) for name in names}, stop=tuple(args.stop), seed=args.seed)
    images = [read_image(path) for path in args.image]

    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.generate.generator import open_generator
    from nemo_bluelm.serve.settings import context_of

    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    if place.world_size != args.tensor:
        return _start_ranks(args, recipe)
    printer = Printer(args.show_thought, context_of(recipe))
    with _memory(sampling), open_generator(checkpoint, args.tensor) as generator:
        if args.prompt is None:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  lets input() edit a line
            Chat(generator, sampling, args.think, printer, images).run(input)
            return 0
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": args.prompt}]
        prompt = Prompt([{"role": "user", "content": content}], images, args.think)
        if place.rank:
            generator.generate([prompt], sampling)
        elif args.json:
            print(json.dumps(asdict(generator.generate([prompt], sampling)[0]), ensure_ascii=False))
        else:
            printer.show(generator.stream([prompt], sampling))
    return 0


@contextlib.contextmanager
def _memory(sampling) -> Iterator[None]:
    """Raises UserError instead of the allocator's error."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):  # of a GPU, of a CPU
            raise
        raise UserError(
            f"there is not enough memory; ask for fewer than {sampling.max_new_tokens:,} --max-new-tokens, shorten the "
            "prompt, or split the model (--tensor)"
        ) from error


def _start_ranks(args: argparse.Namespace, recipe) -> int:
    """This command in as many processes as ``--tensor`` says, of which rank 0 prints.

    Raises:
        UserError: the model can't be split so.
    """
    from dataclasses import replace

    from nemo_bluelm.cli.local_launch import launch
    from nemo_bluelm.config.layout import problems
    from nemo_bluelm.config.schema import ParallelConfig, PrecisionConfig

    if "RANK" in os.environ:
        raise UserError(f"--tensor {args.tensor}: the launcher's job has {os.environ['WORLD_SIZE']} ranks")
    split = replace(
        recipe, parallel=ParallelConfig(tensor=args.tensor), precision=PrecisionConfig(recipe.precision.dtype)
    )
    for problem in problems(split, None):
        raise UserError(f"--tensor {args.tensor}: {problem}")
    words = [args.command, args.checkpoint, {True: "--think", False: "--no-think", None: "--think-auto"}[args.think]]
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("command", "checkpoint", "think", "version") or value is None or value is False:
            continue
        words += (
            [flag] if value is True else [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
        )
    return launch(words, args.tensor)
