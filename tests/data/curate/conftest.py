"""Curation tests need datatrove, the extra ``curate``."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
sys.path.insert(0, str(Path(__file__).parent))
