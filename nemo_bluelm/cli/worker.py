"""What a process does differently as one rank of several: let one rank speak for all."""

import os
import sys
import time
from pathlib import Path

from nemo_bluelm.errors import UserError

# Set by local_launch for its workers only.
REPORTS = "NEMO_BLUELM_REPORTS"

# A rank that lost its peers waits this long for the reason of the one that left first (seconds).
_GRACE = 2.0


def speaks() -> bool:
    """Whether this process speaks for its job: no rank at all, or rank 0 of a launcher that is not ours."""
    return REPORTS not in os.environ and os.environ.get("RANK", "0") == "0"


def report(error: UserError) -> None:
    """Say a user's mistake in one line, once per job.

    Under the local launcher the message goes to the parent, which prints the first one. Under another launcher rank 0
    speaks; any other rank waits until rank 0 would have ended the job, and speaks only if the mistake is its own.
    """
    folder = os.environ.get(REPORTS)
    if folder:
        (Path(folder) / os.environ.get("RANK", "0")).write_text(str(error))
        return
    rank = ""
    if not speaks():
        time.sleep(_GRACE)
        rank = f"rank {os.environ['RANK']}: "
    print_error(f"{rank}{error}")


def print_error(message: str) -> None:
    """The one line of an error on stderr."""
    print(f"nemo-bluelm: error: {message}", file=sys.stderr, flush=True)


def another_rank_reported() -> bool:
    """Whether a user's mistake on another rank explains why this one failed: its peers went away."""
    folder = os.environ.get(REPORTS)
    if not folder:
        return False
    end = time.monotonic() + _GRACE
    while time.monotonic() < end:
        if any(Path(folder).iterdir()):
            return True
        time.sleep(0.1)
    return False
