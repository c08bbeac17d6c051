"""Curation recipes: mistakes in one line, the packaged ones, Slurm's scripts."""

import builtins
import subprocess

import pytest
from curation_pieces import Curation, english, text

from nemo_bluelm import resources
from nemo_bluelm.data.curate.run import dry_run, run
from nemo_bluelm.data.curate.schema import Executor, load_recipe
from nemo_bluelm.errors import UserError

SLURM = ["executor.kind=slurm", "executor.slurm.partition=cpu", "executor.slurm.setup=source env.sh"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("steps.lenth.min=3", "steps.lenth: no such step; did you mean length?"),
        ("steps.length.mn=3", "unknown key steps.length.mn; did you mean min?"),
        ("steps.length.min=few", "steps.length.min: Value 'few'"),
        ("steps.length=3", "steps.length is 3; it must be a mapping of min, max"),
        ("steps=3", "steps: it must be a mapping, not int"),
        ("steps.tags.rules.x=['(']", "steps.tags.rules.x has '(', no regular expression"),
        ("steps.language.allow=[fr]", "steps.language.allow has 'fr'; the rules know zh, en and other"),
        ("steps.near_image_dedup.max_distance=99", "steps.near_image_dedup.max_distance is 99; it must be 0 to 15"),
        ("steps.minhash_dedup.buckets=0", "steps.minhash_dedup.buckets is 0; it must be 1 or more"),
        ("outptu=x", "unknown key outptu; did you mean output?"),
        ("input.shards=3", "input.shards: it must be a list"),
        ("executor.kind=slrum", "executor.kind: Invalid value 'slrum', expected one of [local, slurm]"),
        ("executor.kind=slurm", "executor.slurm.partition is mandatory and not set"),
        ("executor.slurm.partitoin=x", "unknown key executor.slurm.partitoin; did you mean partition?"),
        ("resample.shares.code=2", "resample.shares.code is 2.0; it must be above 0 and below 1"),
        ("resample.shares={a: 0.5, b: 0.5}", "resample.shares add up to 1; leave something for the rest"),
        ("tasks=0", "tasks is 0; it must be 1 or more"),
        ("name=a/b", "name is 'a/b'"),
        ("output=[[[", "output=[[[: the value is not valid YAML"),
        ("output", "output: an override is key=value"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, override, message):
    curation = Curation(tmp_path, {"length": {"min": 1}})
    with pytest.raises(UserError) as error:
        load_recipe(curation.recipe, [override])
    assert message in str(error.value)


def test_mandatory_keys(tmp_path):
    curation = Curation(tmp_path, {"length": None}, input={"root": "."})
    with pytest.raises(UserError, match="recipe.yaml: input.shards is mandatory and not set"):
        load_recipe(curation.recipe)


def test_missing_input_datatrove_or_output_folder(tmp_path, monkeypatch):
    curation = Curation(tmp_path, {"length": {"min": 1}})
    with pytest.raises(UserError, match=r"'\*.tar' matches no file"):
        curation.run()
    curation.add(text("a", english(1)))
    with pytest.raises(UserError, match="has files and is no output of curation"):
        curation.run(f"output={tmp_path}")

    real = builtins.__import__

    def without_datatrove(name, *args, **kwargs):
        if name.startswith("nemo_bluelm.data.curate") and "executors" in (args[2] or ()):
            raise ModuleNotFoundError("No module named 'datatrove'", name="datatrove")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datatrove)
    with pytest.raises(UserError, match=r"curation needs datatrove; pip install 'nemo-bluelm\[curate\]'"):
        curation.run()


def test_off_leaves_a_step_out(tmp_path):
    recipe = load_recipe(Curation(tmp_path, {"length": {"min": 1}, "answer": None}).recipe, ["steps.length=off"])
    assert list(recipe.steps) == ["answer"]


@pytest.mark.parametrize("name", ["curate/text", "curate/image_text"])
def test_full_recipes_become_jobs_that_wait_for_each_other(tmp_path, name):
    curation = Curation(tmp_path, {"length": None}).add(text("a", english(1)))
    overrides = [f"input.root={tmp_path / 'in'}", "input.shards=[a.tar]", f"output={curation.out}", *SLURM, "tasks=40"]
    recipe = load_recipe(resources.find_recipe(name, "curate"), overrides)
    assert recipe.executor.kind is Executor.slurm
    shown = dry_run(recipe)
    assert shown.count("#SBATCH --partition=cpu") == shown.count("launch_pickled_pipeline") >= 6
    assert "#SBATCH --array=0-39%400" in shown
    assert "source env.sh" in shown
    assert f"{curation.out}/work/logs/00-" in shown
    assert not curation.out.exists()


def test_jobs_are_submitted_in_order(tmp_path, monkeypatch):
    curation = Curation(tmp_path, {"length": {"min": 1}, "text_dedup": {"tasks": 2}}).add(text("a", english(1)))
    calls = []

    def sbatch(command, **_):
        calls.append([word for word in command[1:-1] if word.startswith("--dependency")])
        return f"Submitted batch job {100 + len(calls)}".encode()

    monkeypatch.setattr(subprocess, "check_output", sbatch)
    assert run(load_recipe(curation.recipe, SLURM)) is None
    after = [[], ["--dependency=afterok:101"], ["--dependency=afterok:102"], ["--dependency=afterok:103"]]
    assert calls == after


def test_no_sbatch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    curation = Curation(tmp_path, {"length": {"min": 1}}).add(text("a", english(1)))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        curation.run(*SLURM)


@pytest.mark.parametrize("name", ["tiny_text", "tiny_image_text"])
def test_tiny_recipes_run_on_the_quickstart_corpus(tmp_path, corpus, name):
    overrides = [f"input.root={corpus}", f"output={tmp_path / 'out'}"]
    table = run(load_recipe(resources.find_recipe(f"curate/{name}", "curate"), overrides))
    assert "share" in table
    assert list((tmp_path / "out").glob("*.tar"))
