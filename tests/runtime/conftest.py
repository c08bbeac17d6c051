"""Forks that the tests of runs share."""

import pytest


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    from tests.runtime.forks import Forks

    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
