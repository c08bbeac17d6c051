"""Fixtures that tests of several packages share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

TINY = """
defaults:
  - model: tiny
  - parallel: single
  - precision: fp32
  - optim: adamw
  - _self_
name: probe
data:
  root: corpus
  sequence_length: 512
  sources:
    text: {shards: [text-*.tar]}
optim:
  lr: 1.0e-3
train:
  steps: 10
  global_batch_size: 4
"""


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe and returns its path: the tiny one with ``replace`` pairs applied and ``extra`` lines added."""

    def write(*replace: tuple[str, str], extra: str = "", text: str = TINY, name: str = "probe.yaml") -> str:
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text + extra)
        return str(tmp_path / name)

    return write


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process: ``cli("recipes", "--json") -> (exit code, stdout, stderr)``."""
    from nemo_bluelm.cli.main import main

    for name in ("RANK", "WORLD_SIZE", "NEMO_BLUELM_PARENT_PID", "NEMO_BLUELM_REPORTS"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def cli_process():
    """Runs the command line in a process of its own, in the checkout: ``cli_process("recipes").stdout``."""

    def run(*argv: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", *argv]
        return subprocess.run(
            command, cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout
        )

    return run


def one_line(code: int, stderr: str) -> str:
    """The single error line of a user's mistake, its form checked."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("nemo-bluelm: error: ")
    return lines[0].removeprefix("nemo-bluelm: error: ")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The quickstart's corpus, made once."""
    from nemo_bluelm.data.corpus import make_corpus

    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    make_corpus(folder)
    return folder


def pytest_collection_modifyitems(items):
    """Files with slow tests first: of two that are run at a time none should begin when all others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
