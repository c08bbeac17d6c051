"""``nemo-bluelm verify``: an exported folder against the checkpoint that it was made from."""

import argparse
import json
from pathlib import Path

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder that export hf has made; its code is run")
    parser.add_argument("--against", metavar="CKPT", required=True, help="run folder (its newest) or checkpoint folder")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the verdict there")


def run(args: argparse.Namespace) -> int:
    """Compare and return the exit code: 1 if something differs.

    Raises:
        UserError: files are missing or damaged.
    """
    from nemo_bluelm.atomic import write_atomically
    from nemo_bluelm.convert.verify import verdict, verify
    from nemo_bluelm.errors import UserError
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    checkpoint, checks = resolve_checkpoint(args.against, "--against"), []
    print(f"{'stage':<10} {'case':<26} {'difference':>10} {'limit':>8}")
    for check in verify(args.folder, checkpoint):
        checks.append(check)
        mark = "ok" if check.passed else f"DIFFERS  {check.detail}"
        print(f"{check.stage:<10} {check.case:<26} {check.figure:>10.2g} {check.limit:>8.0e}  {mark}", flush=True)
    result = verdict(args.folder, checkpoint, checks)
    if args.json:
        try:
            write_atomically(args.json, (json.dumps(result, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"{args.json} can't be written: {error.strerror}; choose another file") from error
    for note in result["notes"]:
        print(f"note: {note}")
    failed = sum(not check.passed for check in checks)
    print(f"{failed} of {len(checks)} checks differ" if failed else f"all {len(checks)} checks agree")
    return EXIT_DIFFERENT if failed else 0
