"""``nemo-bluelm export``: a folder for other programs out of a checkpoint."""

import argparse
import json
from pathlib import Path

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.errors import UserError

KINDS = ("hf", "vllm", "trtllm", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        metavar="hf|vllm|trtllm|onnx",
        help="for whom: transformers; vLLM, with thinking budgets; TensorRT-LLM, with the package that it needs; "
        "ONNX Runtime: vision tower and projector in one file; or what an installed package registers",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="run folder (its newest) or checkpoint folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to make; of onnx the file")
    parser.add_argument(
        "--flavour",
        choices=["exact", "native"],
        default="exact",
        help="of hf and vllm; exact: with its own modelling code; native: as transformers' Cohere2Vision, if it can be",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: as trained")
    parser.add_argument("--shard-bytes", type=int, metavar="N", help="size of a file of weights (4 GiB)")
    parser.add_argument(
        "--legacy", action="store_true", help="trtllm: the language model alone, for engines of releases up to 1.2"
    )
    parser.add_argument("--tensor", type=positive, default=1, metavar="N", help="--legacy: ranks of an engine (1)")
    parser.add_argument(
        "--quantise", choices=["fp8", "int4_awq"], help="of hf: the language model's linears, by ModelOpt"
    )
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="of --quantise: text, a prompt a line")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Export and return the exit code.

    Raises:
        UserError: a mistake in the arguments or in CKPT.
    """
    if args.kind not in KINDS:
        return _registered(args)
    if args.quantise:
        return _quantise(args)
    from nemo_bluelm.convert.engines import export_trtllm, export_vllm
    from nemo_bluelm.convert.exporting import DTYPES, Flavour, export_hf
    from nemo_bluelm.convert.shards import SHARD_BYTES
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    if args.flavour != "exact" and (args.legacy or args.kind == "onnx"):
        raise UserError("--flavour is of 'export hf' and 'export vllm': this export is of no code; leave it out")
    if args.legacy:
        return _legacy(args)
    if args.kind == "onnx":
        from nemo_bluelm.convert.onnx_export import export_onnx

        checkpoint = resolve_checkpoint(args.checkpoint, "CKPT")
        done = export_onnx(checkpoint, args.folder, DTYPES[args.dtype] if args.dtype else None)
        return _tell(args, done)
    export = {"hf": export_hf, "vllm": export_vllm, "trtllm": export_trtllm}[args.kind]
    done = export(
        resolve_checkpoint(args.checkpoint, "CKPT"),
        args.folder,
        Flavour(args.flavour),
        DTYPES[args.dtype] if args.dtype else None,
        SHARD_BYTES if args.shard_bytes is None else args.shard_bytes,
    )
    return _tell(args, done)


def _registered(args: argparse.Namespace) -> int:
    """By an exporter of another package: a function ``(checkpoint, folder)``, both paths."""
    from nemo_bluelm.registry import EXPORTERS
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    exporter = EXPORTERS.find(args.kind, f"export (besides {', '.join(KINDS)})")
    exporter(resolve_checkpoint(args.checkpoint, "CKPT"), args.folder)
    return 0


def _tell(args: argparse.Namespace, done) -> int:
    if args.json:
        tensors = {part.value: count for part, count in done.tensors.items()}
        print(
            json.dumps(
                {"folder": str(args.folder), "tensors": tensors, "bytes": done.size, "vocabulary": done.vocabulary}
            )
        )
        return 0
    parts = ", ".join(f"{part.value} ({count} tensors)" for part, count in done.tensors.items())
    print(f"{args.folder} holds {parts}, {done.size / 2**20:,.1f} MiB")
    there, here = done.vocabulary
    if here < there:
        print(f"vocabulary: {here} of {there} rows; the others only pad it")
    return 0


def _legacy(args: argparse.Namespace) -> int:
    from nemo_bluelm.convert.exporting import DTYPES
    from nemo_bluelm.convert.trtllm_legacy import export_legacy
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    if args.kind != "trtllm":
        raise UserError(f"--legacy is TensorRT-LLM's, and this is export {args.kind}; leave one of them out")
    dtype = DTYPES[args.dtype] if args.dtype else None
    export_legacy(resolve_checkpoint(args.checkpoint, "CKPT"), args.folder, args.tensor, dtype)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "ranks": args.tensor}))
    else:
        print(f"{args.folder} holds the language model for {args.tensor} ranks of TensorRT-LLM up to 1.2")
    return 0


def _quantise(args: argparse.Namespace) -> int:
    from nemo_bluelm.convert.quantise import Kind, quantise
    from nemo_bluelm.errors import UserError
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    if args.kind != "hf" or args.flavour != "exact" or args.dtype or args.shard_bytes is not None:
        raise UserError("--quantise is of 'export hf' and goes with none of --flavour, --dtype and --shard-bytes")
    if args.calibration is None:
        raise UserError("--quantise needs --calibration FILE: text as users write it, a prompt a line")
    done = quantise(resolve_checkpoint(args.checkpoint, "CKPT"), args.folder, Kind(args.quantise), args.calibration)
    if args.json:
        print(json.dumps({"folder": str(args.folder), **vars(done)}))
        return 0
    print(f"{args.folder}: {done.before / 2**20:,.1f} MiB of weights in BF16, {done.after / 2**20:,.1f} MiB now")
    print(
        f"largest difference of logits: {done.error:.2%} of the largest logit; of the weights alone {done.stored:.2%}"
    )
    return 0
