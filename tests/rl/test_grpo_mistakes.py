"""Mistakes in a GRPO recipe or its prompts, through the real command line: one line with the way out, exit code 2."""

import json

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError
from tests.conftest import one_line
from tests.rl.grpo_runs import MODULES, write_recipe

PROMPT = {"task_name": "problems", "prompt": "What is 1 + 1?"}
KEYS = {
    "grpo.num_generations_per_prompt=1": ["grpo.num_generations_per_prompt", "2 or more"],
    "grpo.num_prompts_per_step=0": ["grpo.num_prompts_per_step", "1 or more"],
    "grpo.num_iterations=0": ["grpo.num_iterations", "1 or more"],
    "train.global_batch_size=5": ["train.global_batch_size", "16 replies"],
    "grpo.num_iterations=3": ["train.steps is 2", "3"],
    "train.micro_batch_size=2": ["train.micro_batch_size", "1"],
    "parallel.context=2": ["parallel.context", "parallel.tensor"],
    "parallel.pipeline=2": ["parallel.pipeline", "parallel.tensor"],
    "data.sequence_length=128": ["data.sequence_length", "128", "grpo.max_prompt_length"],
    "grpo.thinking.share=2": ["grpo.thinking.share", "0 to 1"],
    "grpo.thinking.budget_tokens=-1": ["grpo.thinking.budget_tokens", "0 or more"],
    "grpo.generation.temperature=0": ["grpo.generation.temperature", "greater than 0"],
    "grpo.generation.top_p=1.5": ["grpo.generation.top_p", "at most 1"],
    "grpo.generation.max_new_tokens=2": ["grpo.generation.max_new_tokens", "4 or more"],
    "grpo.loss.ratio_clip_min=0": ["grpo.loss.ratio_clip_min", "greater than 0"],
    "grpo.loss.ratio_clip_c=0.5": ["grpo.loss.ratio_clip_c", "above 1"],
    "grpo.loss.policy_loss=gspo": ["grpo.loss.aggregation", "seq_mean_token_mean"],
    "grpo.loss.policy_loss=ppo": ["grpo.loss.policy_loss", "ppo_clip"],
    "grpo.loss.kl_in_reward=true": ["grpo.loss.kl_in_reward", "reference_policy_kl_penalty"],
    "grpo.loss.entropy_coeff=-1": ["grpo.loss.entropy_coeff", "0 or more"],
    "grpo.loss.entropy_coeff=nan": ["grpo.loss.entropy_coeff is nan", "0 or more"],
    "grpo.loss.rollout_correction.max=-1": ["grpo.loss.rollout_correction", "min < max"],
    "grpo.advantage.std_eps=-1": ["grpo.advantage.std_eps", "0 or more"],
    "grpo.advantage.clip_low=1": ["grpo.advantage.clip_low", "below 0"],
    "grpo.advantage.clip_high=-1": ["grpo.advantage.clip_high", "above 0"],
    "grpo.overlong.buffer_penalty=-1": ["grpo.overlong.buffer_penalty", "0 or more"],
    "grpo.advantage.estimator=gdpo +grpo.advantage.reward_weights.hashd=1": ["reward_weights.hashd", "hashed"],
    "grpo.advantage.estimator=gdpo +grpo.advantage.reward_weights.hashed=-1": ["reward_weights.hashed", "0 or more"],
    "grpo.validation.metric=val/acuracy": ["grpo.validation.metric is val/acuracy", "val/accuracy"],
    "environments.digits.reward_range=[0,9] grpo.advantage.estimator=dr_grpo": ["reward_ranges", "dr_grpo", "null"],
    "environments.digits.reward_range=[0,9] grpo.advantage.normalize=batch": ["reward_ranges", "drown"],
    "environments.digits.reward_range=[0,9] grpo.advantage.estimator=reinforce_pp": ["reward_ranges", "one range"],
    "grpo.val_period=5 grpo.validation.period=7": ["grpo.val_period and grpo.validation.period", "one key"],
    "+grpo.advantage.reward_weights.hashed=1": ["grpo.advantage.reward_weights", "gdpo"],
    "grpo.advantage.estimator=gdpo grpo.overlong.buffer_length=4": ["grpo.overlong.buffer_length", "gdpo"],
    "grpo.overlong.buffer_length=11": ["grpo.overlong.buffer_length", "max_new_tokens"],
    "grpo.dynamic_sampling.max_gen_batches=0": ["grpo.dynamic_sampling.max_gen_batches", "1 or more"],
    "grpo.validation.period=0": ["grpo.validation", "1 or more"],
    "grpo.generation.temprature=1": ["grpo.generation.temprature", "did you mean grpo.generation.temperature?"],
    "environments.digits.num_workers=0": ["environments.digits", "num_workers"],
    "objective=next_token": ["environments is set", "objective=grpo"],
    "parallel.tensor=2 parallel.sequence=true": ["parallel.sequence", "false"],
    "train.cuda_graphs=true": ["train.cuda_graphs", "false"],
}


@pytest.mark.parametrize("overrides", KEYS)
def test_a_key_that_can_not_be(overrides, tmp_path):
    path = str(write_recipe(tmp_path))
    words = [overrides] if "{" in overrides else overrides.split()
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe(path, [*words, "init_from=there"]), None)
    line = str(error.value)
    assert "\n" not in line
    assert [part for part in KEYS[overrides] if part not in line] == [], line


RECORDS = {
    "no prompt": ([{"task_name": "problems"}], "line 1", "messages, prompt or problem"),
    "no user": ([{"messages": [{"role": "assistant", "content": "2"}]}], "line 1", "user's turn"),
    "no list": ([{"messages": "What?"}], "line 1", "list of turns"),
    "unknown task": ([{**PROMPT, "task_name": "digit"}], "'digit'", "did you mean digits?"),
    "no object": ([PROMPT, 5], "line 2", "must be an object"),
    "nothing": ([], "data.sources.problems", "no records"),
    "images that are none": ([{**PROMPT, "images": 7}], "line 1", "images"),
    "task that is none": ([{**PROMPT, "task_name": None}], "task_name 'None'", "digits"),
}


def paths(records, corpus, folder):
    """Overrides for a source of these records alone."""
    root = folder / "prompts"
    root.mkdir()
    (root / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "tokenizer.json").symlink_to(corpus / "tokenizer.json")
    return [f"data.root={root}", "~data.sources.digits", "data.sources.problems.shards=[prompts.jsonl]"]


@pytest.mark.parametrize("mistake", RECORDS)
def test_a_record_that_can_not_be(mistake, corpus, tmp_path, cli, monkeypatch):
    monkeypatch.syspath_prepend(str(MODULES))
    records, *expected = RECORDS[mistake]
    data = paths(records, corpus, tmp_path)
    run_dir = tmp_path / "run"
    code, out, err = cli("train", str(write_recipe(tmp_path)), *data, "init_from=null", f"run_dir={run_dir}")
    line = one_line(code, err)
    assert [part for part in expected if part not in line] == [], line
    assert out == "" and not run_dir.exists()


MISSING = [{**PROMPT, "images": ["lost.png"]}]
LONG = [{**PROMPT, "prompt": "word " * 3000}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "records, overrides, expected",
    [
        (MISSING, [], ["lost.png"]),
        (LONG, [], ["prompts in a row can't be used", "grpo.max_prompt_length"]),
        (
            [PROMPT],
            ["grpo.num_prompts_per_step=3", "train.global_batch_size=4", "train.steps=3", "--nproc", "2"],
            ["multiple", "4"],
        ),
    ],
)
def test_a_mistake_that_only_the_run_finds(records, overrides, expected, corpus, tmp_path, cli_process):
    data = paths(records, corpus, tmp_path)
    result = cli_process(
        *("train", str(write_recipe(tmp_path)), *data, "init_from=null", f"run_dir={tmp_path / 'run'}"),
        *overrides,
        PYTHONPATH=str(MODULES),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr, result.stderr
    line = next(line for line in result.stderr.splitlines() if line.startswith("nemo-bluelm: error: "))
    assert [part for part in expected if part not in line] == [], line
