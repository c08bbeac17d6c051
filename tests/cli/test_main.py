"""The command line's contract: quick help, one-line mistakes, exit codes, JSON."""

import json
import subprocess
import sys

import pytest

from nemo_bluelm.cli import main as cli_main
from tests.conftest import CHECKOUT, one_line

HEAVY = {"torch", "nemo", "megatron", "hydra", "omegaconf", "yaml", "rich", "transformers", "numpy"}


def test_start_imports_nothing_heavy():
    code = "import sys, nemo_bluelm.cli.main; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["plan", "--help"], ["doctor", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom nemo_bluelm.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert "usage: nemo-bluelm" in done.stdout
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_help_lists_every_command(cli):
    code, out, _ = cli()
    assert code == 0
    assert all(name in out for name in cli_main.COMMANDS)


def test_version(cli):
    from nemo_bluelm import __version__

    assert cli("--version") == (0, f"nemo-bluelm {__version__}\n", "")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["trian"], ["'trian'", "train", "--help"]),
        (["train"], ["RECIPE", "nemo-bluelm train --help"]),
        (["train", "tiny/sft", "--nprocs", "2"], ["--nprocs"]),
        (["train", "tiny/sft", "--nproc", "0"], ["--nproc", "'0'", "1 or more"]),
        (["train", "tiny/sft", "--steps=3"], ["--steps=3"]),
        (["train", "nope"], ["nope: recipe not found", "tiny/sft"]),
        (["train", "tiny/sft", "optim.lrr=1"], ["did you mean optim.lr?"]),
        (["train", "tiny/sft", "--nproc", "2", "parallel.tensor=4"], ["num_query_groups is 2"]),
        (["train", "tiny/sft", "parallel.tensor=2"], ["tensor 2", "--nproc 2"]),
        (["train", "sft"], ["data.root, init_from are mandatory"]),
        (["plan", "tiny/sft", "model.geometry.tile=57"], ["nearest is 56"]),
        (["plan", "tiny/sft", "--image", "3by4"], ["'3by4'", "WIDTHxHEIGHT"]),
        (["plan", "tiny/sft", "parallel.tensor=2", "--world-size", "3"], ["the job has 3 processes"]),
        (["recipes", "x"], ["x"]),
    ],
)
def test_mistakes(cli, argv, expected):
    code, out, err = cli(*argv)
    message = one_line(code, err)
    assert out == ""
    assert all(text in message for text in expected), message


@pytest.mark.parametrize("argv", [["train", "nope"], ["train", "tiny/sft", "optim.lr=x"], ["frobnicate"]])
def test_mistakes_of_a_process(cli_process, argv):
    done = cli_process(*argv)
    one_line(done.returncode, done.stderr)


def test_bad_recipe_is_refused_without_importing_torch():
    code = (
        "import sys\nfrom nemo_bluelm.cli.main import main\n"
        "assert main(['train', 'tiny/sft', 'parallel.tensor=3', '--nproc', '3']) == 2\n"
        "assert not {'torch', 'nemo', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, check=True)


def test_nproc_under_a_launcher_is_refused(cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = cli("train", "tiny/sft", "--nproc", "2")
    assert "leave --nproc out" in one_line(code, err)


def test_another_launchers_world_size_is_checked(cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = cli("train", "tiny/sft", "parallel.tensor=2")
    assert "the job has 3 processes" in one_line(code, err)


def test_overrides_around_options():
    args = cli_main.parse(["train", "tiny/sft", "a=1", "--nproc", "2", "b=2", "~c"])
    assert (args.recipe, args.overrides, args.nproc) == ("tiny/sft", ["a=1", "b=2", "~c"], 2)
    args = cli_main.parse(["plan", "--json", "tiny/sft", "a=1"])
    assert (args.recipe, args.overrides, args.json) == ("tiny/sft", ["a=1"], True)


def test_interruption_is_one_line(cli, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main, "command_module", interrupted)
    assert cli("recipes") == (130, "", "nemo-bluelm: interrupted\n")


def test_closed_pipe_is_quiet():
    command = f"{sys.executable} -m nemo_bluelm.cli.main recipes --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stderr == ""


def test_recipes(cli):
    code, out, err = cli("recipes", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert {"tiny/sft", "tiny/align_projector", "sft", "align_projector"} <= {row["name"] for row in rows}
    assert all(row["about"] for row in rows)
    assert all(row["about"] in cli("recipes")[1] for row in rows)
