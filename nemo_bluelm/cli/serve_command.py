"""``nemo-bluelm serve``: answer over HTTP, in the shape of OpenAI's API."""

import argparse
import os

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, or one of its checkpoints")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="to listen on; 0 takes a free one (8000)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that clients send")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (the recipe's name)")
    limits = parser.add_argument_group("limits; memory for requests is at most --max-queue times --max-body-mb")
    for flag, default, what in (
        ("--max-queue", 256, "requests at once, waiting or in work; more get 429"),
        ("--max-batch", 32, "replies written together"),
        ("--max-batch-tokens", 131_072, "prompts and new tokens of a batch: the cache of keys and values"),
        ("--max-tokens", 1024, "new tokens of a reply whose request doesn't say"),
        ("--max-body-mb", 20, "MiB of a request; more get 413"),
        ("--max-images", 16, "images of a request"),
        ("--max-image-mb", 10, "MiB of an image file"),
        ("--max-image-mpixels", 16, "million pixels of an image"),
        ("--request-timeout", 600, "seconds from a request's arrival to the end of its reply"),
        ("--stall-timeout", 30, "seconds after which a client that neither sends nor reads is cut off"),
        ("--grace", 30, "seconds for accepted requests to end in after SIGTERM"),
    ):
        limits.add_argument(flag, type=positive, default=default, metavar="N", help=f"{what} ({default})")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit code.

    Raises:
        UserError: a mistake in the arguments, or the address can't be had.
    """
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint
    from nemo_bluelm.serve.settings import Settings

    checkpoint = resolve_checkpoint(args.checkpoint, "CHECKPOINT")
    settings = Settings(
        host=args.host,
        port=args.port,
        api_key=_key(args.api_key_env),
        model_name=args.model_name,
        max_requests=args.max_queue,
        max_batch=args.max_batch,
        max_batch_tokens=args.max_batch_tokens,
        max_tokens=args.max_tokens,
        max_body=args.max_body_mb << 20,
        max_images=args.max_images,
        max_image_bytes=args.max_image_mb << 20,
        max_image_pixels=args.max_image_mpixels * 1_000_000,
        request_seconds=args.request_timeout,
        stall_seconds=args.stall_timeout,
        grace_seconds=args.grace,
    )
    try:
        from nemo_bluelm.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise UserError(f"the server needs {error.name}; pip install 'nemo-bluelm[serve]'") from error
    serve(checkpoint, settings)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; it must be 0 to 65535")
    return int(text)


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not os.environ.get(name):
        raise UserError(f"--api-key-env {name}: the environment has no such variable, or an empty one; export it first")
    return os.environ[name]
