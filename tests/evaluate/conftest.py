"""Makes the oracles importable and hands out Megatron's world."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))  # also under pytest's importlib mode

from megatron_world import world  # noqa: E402, F401
