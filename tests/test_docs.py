"""What documentation and containers refer to is there; tests/functional/test_readme_commands.py runs the commands."""

import re
import subprocess
import sys
from configparser import ConfigParser
from html import unescape
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nemo_bluelm.cli.main import COMMANDS

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = sorted((CHECKOUT / "docs").rglob("*.md"))


def test_the_reference_of_keys_is_the_schemas():
    tool = [sys.executable, CHECKOUT / "tools" / "make_key_reference.py", "--check"]
    assert subprocess.run(tool).returncode == 0, "make docs"
    text = (CHECKOUT / "docs" / "reference" / "keys.md").read_text()
    assert "| `train.hang_timeout` | number | `3600.0` | seconds without" in text
    assert "| `warn_before` | integer | `300` |" in text


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    included = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
    for page in PAGES:
        place = page.relative_to(CHECKOUT / "docs").with_suffix("")
        built = (tmp_path / "site" / ("" if place.name == "index" else place) / "index.html").read_text()
        shown = unescape(re.sub(r"<[^>]*>", "", built))  # without the spans of the colours
        assert "--8" not in shown and "fonts.googleapis" not in built
        for file in included.findall(page.read_text()):
            assert (CHECKOUT / file).read_text().strip() in shown, f"{page.name} lacks {file}"
    extend = (CHECKOUT / "docs" / "tutorials" / "extend.md").read_text()
    files = {Path(file).name for file in included.findall(extend)}
    assert files == {"pyproject.toml", "reward.py", "source.py", "tower.py", "stage.py", "questions.yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_text_are_commands(page):
    said = re.findall(r"(?:^|[`(])nemo-bluelm ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(said) <= set(COMMANDS)
    for command in COMMANDS if page.stem == "commands" else ():
        assert f"`{command}" in page.read_text() or f", `{command}`" in page.read_text(), command


@pytest.mark.parametrize("file", sorted((CHECKOUT / "docker").glob("Dockerfile.*")), ids=lambda file: file.suffix)
def test_what_an_image_copies_is_there(file):
    copied = [word for line in file.read_text().splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((CHECKOUT / name).exists() for name in copied)
    extras = re.findall(r'"\.\[([\w,]+)\]"', file.read_text())
    known = ConfigParser()
    known.read(CHECKOUT / "setup.cfg")
    assert set(",".join(extras).split(",")) <= set(known["options.extras_require"])


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_constraints_are_within_the_ranges_of_setup_cfg(name):
    lines = (CHECKOUT / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    config = ConfigParser()
    config.read(CHECKOUT / "setup.cfg")
    wanted = (
        config["options"]["install_requires"] + config["options.extras_require"]["gpu" if name == "gpu" else "serve"]
    )
    for line in wanted.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.name.lower() in pins:
                assert requirement.specifier.contains(Version(pins[requirement.name.lower()])), line
