"""Makes this folder's helpers importable, here and in the processes of rewards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also under pytest's importlib mode
