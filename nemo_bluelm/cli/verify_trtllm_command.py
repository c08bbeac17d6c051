"""``nemo-bluelm verify-trtllm``: TensorRT-LLM's answers against those of the checkpoint, on the machine that serves."""

import argparse
import subprocess
import sys
from pathlib import Path

from nemo_bluelm.errors import UserError

SCRIPT = "verify_trtllm.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder that export trtllm has made; its code is run")
    parser.add_argument("--tolerance", type=float, metavar="X", help="of log-probabilities (0.2)")


def run(args: argparse.Namespace) -> int:
    """Compare and return the exit code: 1 if an answer differs.

    Raises:
        UserError: DIR is no such folder, or TensorRT-LLM is not installed.
    """
    from importlib.util import find_spec

    script = args.folder / SCRIPT
    if not script.is_file():
        raise UserError(f"{args.folder} has no {SCRIPT}; make the folder with 'nemo-bluelm export trtllm'")
    if find_spec("tensorrt_llm") is None:
        raise UserError(f"TensorRT-LLM is not installed here; run 'python {script}' where trtllm-serve runs")
    # A script of its own: TensorRT-LLM's worker processes import it again, and with it the model.
    tolerance = [] if args.tolerance is None else ["--tolerance", str(args.tolerance)]
    return subprocess.run([sys.executable, str(script), *tolerance]).returncode
