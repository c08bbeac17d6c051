"""The ``nemo-bluelm`` command: finds the subcommand, runs it, turns mistakes into one line and an exit code.

Only the standard library and light modules of ours are imported here, so that ``--help`` answers at once; a command's
module is imported when that command is called.
"""

import argparse
import importlib
import os
import sys
from types import ModuleType

from nemo_bluelm.cli import worker
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import quiet
from nemo_bluelm.runtime.parent import follow_parent

# Command -> what --help says about it. The command's module is nemo_bluelm.cli.<name>_command, with _ for -.
COMMANDS = {
    "train": "train a recipe, on this machine or as one rank of a launcher's job",
    "launch": "run a recipe, pipeline or ablation on a Slurm cluster; status, logs and cancel look after it",
    "ablate": "train the variants of an ablation, measure each, write a table and a plot",
    "prune": "cut a checkpoint's language model to a narrower recipe's shape",
    "merge": "write a checkpoint with LoRA's adapters merged into its weights",
    "import": "make a checkpoint of a Hugging Face model's weights",
    "export": "write a checkpoint as a folder that transformers, vLLM or TensorRT-LLM load",
    "verify": "compare an exported folder with its checkpoint, stage by stage",
    "verify-trtllm": "compare TensorRT-LLM's answers with those of an exported folder's checkpoint",
    "generate": "ask a checkpoint, once or in a chat",
    "serve": "answer over HTTP, in the shape of OpenAI's API",
    "eval": "ask a benchmark's problems in both modes and with thinking budgets, and score the answers",
    "report": "show what happened in runs, as one page",
    "plan": "show what a recipe resolves to: config, parameters, tokens per image, layout",
    "data": "index, inspect, curate: what to do with shards before and between runs",
    "bench": "time a part of the stack beside what users know",
    "quickstart": "make a small corpus, train on it and answer questions about unseen images",
    "recipes": "list the packaged recipes",
    "doctor": "show what is installed, what will be used and how to add what is missing",
}
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse with this project's contract for mistakes: one line, raised as a UserError."""

    def error(self, message: str):
        raise UserError(f"{message}; see '{self.prog} --help'")


def command_module(name: str) -> ModuleType:
    """The module of a command; it has ``add_arguments(parser)`` and ``run(args) -> int``."""
    return importlib.import_module(f"nemo_bluelm.cli.{name.replace('-', '_')}_command")


def build_parser(argv: list[str]) -> Parser:
    """The parser for ``argv``: every command is listed, only the one that ``argv`` names is imported and filled in."""
    parser = Parser(
        prog="nemo-bluelm",
        description="Training stack of BlueLM-2.5-3B on NVIDIA NeMo and Megatron-Core.",
        epilog="nemo-bluelm COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            command_module(name).add_arguments(sub)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of ``argv``; overrides may stand before, between and after the options.

    Raises:
        UserError: an unknown command or option, or a missing argument.
    """
    parser = build_parser(argv)
    args, rest = parser.parse_known_args(argv)
    # argparse takes the key=value words only where they stand together; the ones behind an option are left over.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        command = f"{parser.prog} {args.command}" if args.command else parser.prog
        raise UserError(f"{unknown}: no such option or argument; see '{command} --help'")
    if rest:
        args.overrides += rest
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is success, 2 a mistake the user can mend (one line on stderr), 130 an interruption; a bug keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    follow_parent()
    quiet()
    try:
        args = parse(argv)
        if args.version:
            from nemo_bluelm import __version__

            print(f"nemo-bluelm {__version__}")
            return 0
        if args.command is None:
            build_parser(argv).print_help()
            return 0
        code = command_module(args.command).run(args)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
        return code
    except UserError as error:
        worker.report(error)
        return UserError.EXIT_CODE
    except KeyboardInterrupt:
        if worker.speaks():
            print("nemo-bluelm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; what is left to flush must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if worker.another_rank_reported():
            return UserError.EXIT_CODE
        raise


if __name__ == "__main__":
    sys.exit(main())
