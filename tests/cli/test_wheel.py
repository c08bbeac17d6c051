"""A wheel carries every recipe and block, and finds them far from the checkout."""

import subprocess
import sys
import zipfile

import pytest

from nemo_bluelm import resources
from tests.conftest import CHECKOUT

setuptools_build = pytest.importorskip("setuptools.build_meta")


def test_wheel_holds_recipes_and_blocks(tmp_path):
    copy = tmp_path / "checkout"
    # A copy, for building writes beside the sources; git's own list leaves out environments and outputs.
    names = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "conf", "recipes", "nemo_bluelm"]
    subprocess.run(["mkdir", "-p", copy], check=True)
    subprocess.run(["cp", "-a", *(CHECKOUT / name for name in names), copy], check=True)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True)
    wheel = tmp_path / done.stdout.splitlines()[-1]

    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in (resources.conf_dir(), resources.recipes_dir()):
        for file in folder.rglob("*.yaml"):
            assert f"nemo_bluelm/{folder.name}/{file.relative_to(folder)}" in held
    package = CHECKOUT / "nemo_bluelm"
    files = [*(package / "report" / "templates").iterdir(), package / "evaluate" / "prompts.jsonl"]
    files += (package / "convert").rglob("*.md")
    for module in [*package.rglob("*.py"), *files]:
        assert str(module.relative_to(CHECKOUT)) in held
    assert not [name for name in held if name.startswith(("tests/", "conf/", "recipes/"))]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from nemo_bluelm.cli.main import main; main(['plan', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "tiny/sft" in done.stderr, done.stderr
    code = code.replace("main(['plan', 'x'])", "main(['train', 'sft'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "data.root, init_from are mandatory" in done.stderr, done.stderr
