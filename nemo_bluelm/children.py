"""Python processes that this package starts. Standard library only."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def python_environment() -> dict[str, str]:
    """Variables for a child run with ``-m``: it imports this package, and nothing from the folder it runs in."""
    path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
