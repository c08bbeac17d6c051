"""Forks, as the tests of runs have them."""

from tests.runtime.conftest import forks  # noqa: F401
