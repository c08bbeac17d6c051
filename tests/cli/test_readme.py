"""What the README shows can be typed: its commands parse, its recipes compose, its error is the real one."""

import re
import shlex

import pytest

from nemo_bluelm import resources
from nemo_bluelm.cli import main as cli_main
from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_without_data
from nemo_bluelm.config.pipeline import load_pipeline
from nemo_bluelm.train.chain import load_stage
from tests.conftest import CHECKOUT, one_line

README = (CHECKOUT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


LINES = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("nemo-bluelm ")]


def test_commands_are_found():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses_and_its_recipe_composes(line):
    args = cli_main.parse(shlex.split(line)[1:])
    if hasattr(args, "recipe"):
        kind = "curate" if args.command == "data" and args.subcommand == "curate" else None
        assert resources.find_recipe(args.recipe, kind).is_file()
        if kind is None:
            load_without_data(args.recipe, args.overrides)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_target_exists(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)


def test_files_that_commands_name_exist():
    for path in re.findall(r"\b(?:constraints|recipes|conf|tools)/[\w./-]+\w", "\n".join(LINES)):
        assert (CHECKOUT / path).exists(), path


PIPELINES = [text for text in blocks("yaml") if "stages:" in text]


@pytest.mark.parametrize("text", PIPELINES)
def test_example_pipeline_composes(text, recipe_file):
    for stage in load_pipeline(recipe_file(text=text), []).stages:
        check_recipe(load_stage(stage), world_size=1)


@pytest.mark.parametrize("text", [text for text in blocks("yaml") if text not in PIPELINES])
def test_example_recipe_composes(text, recipe_file):
    part = "name:" not in text
    rest = "name: x\ntrain: {steps: 1}\noptim: {lr: 1.0e-4}\n" if part else ""
    _, missing, _ = load_without_data(recipe_file(text=rest + text), [])
    assert missing == (["data.root"] if part else [])


def test_shown_errors_are_real(cli):
    for block in blocks("console"):
        command, shown = block.splitlines()
        code, _, err = cli(*shlex.split(command.removeprefix("$ nemo-bluelm ")))
        assert f"nemo-bluelm: error: {one_line(code, err)}" == shown


def test_folders_in_the_map_exist():
    for path in re.findall(r"^\| (`.+?`) \|", README.split("## The repository")[1], re.MULTILINE):
        for folder in re.findall(r"`(.+?)`", path):
            assert (CHECKOUT / folder).exists(), folder
