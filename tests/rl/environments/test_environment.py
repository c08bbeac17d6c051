"""Environments: what several rewards come to, what is no reward, and that nothing waits, leaks or is left."""

import json
import math
import os
import sys
import threading
import time
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_bluelm import resources
from nemo_bluelm.config.rewards import EnvironmentConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.environments import Environments, Episode, Said, register_reward
from nemo_bluelm.rl.environments.compose import Composition

SAMPLES = ["sample_rewards"]


def config(rewards, **others) -> EnvironmentConfig:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvironmentConfig), {"rewards": rewards, **others}))


def episode(said, task="task", think=None, thought=None, **fields):
    return Episode(task, fields, Said(thought, said), think)


def composition(rewards, **others):
    import sample_rewards  # noqa: F401  (it registers them)

    return Composition(config(rewards, **others), "task")


@pytest.fixture
def environments():
    """Makes environments that are closed at the end; then none of their processes is there."""
    made = []

    def make(**configs):
        made.append(Environments(configs))
        return made[-1]

    before = children()
    yield make
    for one in made:
        one.close()
    assert children() == before


def children() -> set[int]:
    found = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                found |= set(map(int, file.read().split()))
        except FileNotFoundError:
            pass  # that thread has ended
    return found


# What several rewards come to.


@pytest.mark.parametrize(
    "answer, thought, value, components",
    [
        ("yes", "hm", 1.0, {"exact": 1.0, "format": 1.0}),
        ("yes", None, 0.9, {"exact": 1.0, "format": 0.0}),
        ("no", "hm", 0.1, {"exact": 0.0, "format": 1.0}),
        ("no", None, 0.0, {"exact": 0.0, "format": 0.0}),
    ],
)
def test_the_weighted_mean_and_its_components(answer, thought, value, components):
    rewards = {"exact": {"weight": 0.9}, "format": {"weight": 0.1}}
    found = composition(rewards).reward(episode(answer, think=True, thought=thought, answer="yes"))
    assert found.value == pytest.approx(value) and found.components == components
    assert found.correct is (answer == "yes")
    assert composition(rewards).weights == {"exact": 0.9, "format": 0.1}
    scaled = composition({"exact": {"weight": 9}, "format": {"weight": 1}}, reward_range=[-1, 3])
    found = scaled.reward(episode(answer, think=True, thought=thought, answer="yes"))
    assert found.value == pytest.approx(-1 + 4 * value) and found.components == components


def test_a_reward_without_weight_is_only_told():
    found = composition({"exact": {}, "number": {"weight": 0}}).reward(episode("no number", answer="no number"))
    assert found.value == 1 and found.components == {"exact": 1, "number": None} and found.failed


def test_one_reward_twice_under_names_of_your_own():
    rewards = {"strict": {"reward": "exact", "case": True}, "lenient": {"reward": "exact", "match": "contains"}}
    found = composition(rewards).reward(episode("It is Paris", answer="paris"))
    assert found.value == 0.5 and found.components == {"strict": 0, "lenient": 1}


@pytest.mark.parametrize(
    "said, value",
    [("-3", 0), ("7", 1), ("2", 0.5), ("7.1", None), ("-4", None), ("nan", None), ("inf", None), ("1e400", None)],
)
def test_values_of_a_declared_range(said, value):
    """What is outside of it is nobody's reward, and not pushed into it."""
    found = composition({"number": {"range": [-3, 7]}}).reward(episode(said))
    assert found.value == value and not found.failed
    assert value is not None or "not in the range [-3, 7]" in found.reason


def test_no_exception_becomes_a_number():
    found = composition({"exact": {}, "number": {}}).reward(episode("seven", answer="seven"))
    assert found.value is None and found.correct is True and found.failed
    assert found.components == {"exact": 1, "number": None}  # the one that has a value keeps it, for GDPO
    assert "number: ValueError: could not convert" in found.reason
    assert composition({"number": {"least": 5}}).reward(episode("3")).reason == "number: it has no value"
    for said, reason in (("odd", "not a score"), ("text", "not in the range")):
        odd = composition({"obedient": {}}).reward(episode(said))
        assert odd.value is None and reason in odd.reason


@pytest.mark.parametrize(
    "truncated, value, correct", [("minimum", -1, False), ("mask", None, None), ("score", 1, True)]
)
def test_replies_cut_at_their_length(truncated, value, correct):
    """The least there is, even where rewards are negative."""
    made = composition({"exact": {}}, truncated=truncated, reward_range=[-1, 1])
    cut = Episode("task", {"answer": "7"}, Said(None, "7", finished=False, stop_reason="length"))
    found = made.reward(cut)
    assert (found.value, found.correct, found.truncated) == (value, correct, True)
    at_the_end = Said(None, "7", finished=True, stop_reason="stop")
    assert made.reward(Episode("task", {"answer": "7"}, at_the_end)).value == 1


def test_an_episode_of_a_generator_goes_to_processes_without_its_tokens():
    from nemo_bluelm.generate.request import Reply

    whole = Reply("hm", "7", True, tokens=(1, 2), stop_reason="eos", thinking_tokens=3, answer_tokens=1)
    light = Episode("task", {"answer": "7"}, whole, True).light()
    assert light == Episode("task", {"answer": "7"}, Said("hm", "7", True, "eos", 3, 1), True)


# Processes.


def test_rewards_come_in_order_while_others_are_still_made(environments):
    made = environments(task=config({"obedient": {}}, imports=SAMPLES, num_workers=3))
    slow = made.start_step([episode("wait 0.5"), episode("bad")])
    fast = made.start_step([episode("fine"), episode("bad"), episode("print")])
    assert [reward.value for reward in made.finish_step(fast)] == [1, 0, 1]
    assert [reward.value for reward in made.finish_step(slow)] == [1, 0]


def test_one_that_takes_too_long_is_killed_with_its_children(environments, tmp_path):
    rewards = {"obedient": {"folder": str(tmp_path)}}
    made = environments(task=config(rewards, imports=SAMPLES, num_workers=1, timeout=1.0))
    found = made.step([episode("fine"), episode("sleep"), episode("die"), episode("fine")])
    assert [reward.value for reward in found] == [1, None, None, 1]
    assert found[1].timed_out and "no reward within 1 s" in found[1].reason and 1 <= found[1].seconds < 20
    assert found[2].failed and "ended its process" in found[2].reason and not found[2].timed_out
    assert_gone(map(int, (tmp_path / "children").read_text().split()))


def assert_gone(processes):
    for process in processes:
        deadline = time.monotonic() + 10
        while running(process) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not running(process)


def running(process) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_closing_ends_what_runs_and_cancels_what_waits(environments, tmp_path):
    rewards = {"obedient": {"folder": str(tmp_path)}}
    made = environments(task=config(rewards, imports=SAMPLES, num_workers=1, timeout=300))
    running_one, waiting = made.start_step([episode("sleep"), episode("fine")])
    while not (tmp_path / "children").exists():
        time.sleep(0.02)
    begun = time.monotonic()
    made.close()
    assert time.monotonic() - begun < 10
    assert running_one.result().value is None
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(CancelledError):
        made.step([episode("fine")])
    assert_gone(map(int, (tmp_path / "children").read_text().split()))


def test_a_process_that_can_not_start_is_told(environments, monkeypatch):
    made = environments(task=config({"obedient": {}}, imports=SAMPLES))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("environments")])
    (found,) = made.step([episode("fine")])
    assert found.value is None and found.failed and "No module named 'sample_rewards'" in found.reason


def test_metrics(environments):
    mixed = {"exact": {"weight": 0.9}, "format": {"weight": 0.1}}
    made = environments(
        task=config(mixed), other=config({"number": {}}, imports=SAMPLES), half=config({"exact": {}}, type="halved")
    )
    tasks = ["task", "task", "other", "other", "other", "half", "task"]
    said = ["yes", "no", "1", "0.5", "x", "yes", "yes"]
    episodes = [episode(answer, task, answer="yes") for task, answer in zip(tasks, said)]
    episodes[-1] = Episode("task", {"answer": "yes"}, Said(None, "", finished=False, stop_reason="length"))
    rewards, found = made.global_post_process_and_metrics(tasks, made.step(episodes))
    assert [reward.value for reward in rewards] == pytest.approx([1, 0.1, 1, 0.5, None, 0.5, 0])
    assert found["reward/task/mean"] == pytest.approx(1.1 / 3) and found["accuracy/task"] == pytest.approx(1 / 3)
    assert (found["reward/other/min"], found["reward/other/max"], found["reward/other/std"]) == (0.5, 1, 0.25)
    assert found["env/other/unscorable_rate"] == found["env/other/error_rate"] == pytest.approx(1 / 3)
    assert found["env/task/truncation_rate"] == pytest.approx(1 / 3) and found["env/task/unscorable_rate"] == 0
    assert found["env/task/timeout_rate"] == 0 and found["env/task/latency"] > 0
    assert found["reward_component/exact/mean"] == 0.5 and found["reward_component/format/mean"] == pytest.approx(2 / 3)
    assert found["reward/mean"] == pytest.approx(3.1 / 6) and found["env/half/halved"] == 1
    assert all(math.isfinite(value) for value in found.values())


# A judge that fails.


class _Judge(BaseHTTPRequestHandler):
    """Right is 0.75 to it; of ten calls one gets an error, one a late answer, and one garbage."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        number = int(asked.rpartition("number ")[2])
        content = "It is good.\nScore: 0.75"
        if number % 10 == 3:
            time.sleep(5)
        if number % 10 == 5:
            content = "Score: 10000" if number % 20 == 5 else "\x00 yes"
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        try:
            self.send_response(500 if number % 10 == 7 else 200)
            self.end_headers()
            self.wfile.write(body)
        except BrokenPipeError:
            pass  # it came too late

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_judge_that_fails_for_three_calls_of_ten(environments):
    """Those have no value at all, all others the right one, and the metrics say so; then nobody is there any more."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "timeout": 2.0, "retries": 0}
    judge["prompt"] = "number {{ said }}"
    made = environments(task=config({"judge": {"weight": 0.9, **judge}, "format": {"weight": 0.1}}, num_workers=4))
    rewards, found = made.global_post_process_and_metrics(
        ["task"] * 40, made.step([episode(str(number), answer="x") for number in range(40)])
    )
    for number, reward in enumerate(rewards):
        wrong = number % 10 in (3, 5, 7)
        assert reward.value == (None if wrong else pytest.approx(0.775)), (number, reward)
        assert reward.components == {"judge": None if wrong else 0.75, "format": 1.0}
        assert not wrong or "judge" in reward.reason
    assert found["env/task/timeout_rate"] == 0.1 and found["env/task/error_rate"] == 0
    assert found["env/task/unscorable_rate"] == 0.3 and found["reward/task/std"] == pytest.approx(0)
    server.shutdown()
    server.server_close()
    down = made.step([episode("1", answer="x")] * 8)
    assert all(reward.value is None and reward.reason for reward in down)


# What a recipe says.


def packaged():
    return sorted(path.stem for path in (resources.conf_dir() / "rewards").glob("*.yaml"))


@pytest.mark.parametrize("name", packaged())
def test_packaged_environments(name, environments):
    content = yaml.safe_load((resources.conf_dir() / "rewards" / f"{name}.yaml").read_text())
    merged = OmegaConf.merge(OmegaConf.structured(EnvironmentConfig), content)
    if name == "reward_model":  # tests of reward models open one
        with pytest.raises(UserError, match="reward reward_model: checkpoint is null; name the run of a reward model"):
            environments(reward_model=OmegaConf.to_object(merged))
        return
    if name == "judge":
        with pytest.raises(UserError, match="environment judge: reward judge: base_url is None"):
            environments(judge=OmegaConf.to_object(merged))
        merged.rewards.judge.base_url, merged.rewards.judge.model = "http://127.0.0.1:9/v1", "m"
    environments(**{name: OmegaConf.to_object(merged)})


def test_packaged_environments_reward_what_is_right(environments):
    """One right and one wrong reply each, but for those of models, through the processes."""
    answers = {
        "math": ("so \\boxed{\\frac{1}{2}}", "1/3", {"expected_answer": "0.5"}),
        "mcq": ("(B)", "A", {"expected_answer": "B", "options": ["red", "blue"]}),
        "exact": ("Paris.", "Rome", {"expected_answer": "paris"}),
        "ocr": ("Total 42", "xyz", {"expected_answer": "Total 42"}),
        "grounding": ("[1, 1, 9, 9]", "[9, 9, 1, 1]", {"box": [1, 1, 9, 9]}),
        "gui": ("click(5, 5)", "back()", {"action": {"type": "click", "box": [1, 1, 9, 9]}}),
        "instructions": ("a b", "a, b", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
        "code": ("```\ndef f(): return 3\n```", "def f(): return 4", {"tests": ["assert f() == 3"]}),
    }
    assert set(answers) == set(packaged()) - {"judge", "reward_model"}
    folder = resources.conf_dir() / "rewards"
    configs = {name: config(**yaml.safe_load((folder / f"{name}.yaml").read_text())) for name in answers}
    for one in configs.values():
        one.num_workers = 1
    made = environments(**configs)
    episodes = [episode(said, name, **fields) for name, (*both, fields) in answers.items() for said in both]
    rewards = made.step(episodes)
    for name, right, wrong in zip(answers, rewards[::2], rewards[1::2]):
        assert right.value == 1 and right.correct, (name, right)
        assert wrong.value < 0.3 and wrong.correct is False, (name, wrong)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rewards": {}}, "environment task: rewards is empty"),
        ({"rewards": {"exakt": {}}}, "environment task: reward exakt: .*did you mean exact"),
        ({"rewards": {"exact": {"cse": True}}}, "reward exact: unknown key cse; did you mean case"),
        ({"rewards": {"exact": {"weight": -1}}}, "reward exact: weight is -1; it must be 0 or more"),
        ({"rewards": {"exact": {"weight": 0}}}, "the weights of its rewards are all 0"),
        ({"rewards": {"exact": 0.5}}, "reward exact: it is a mapping"),
        ({"rewards": {"exact": {"range": [1, 1]}}}, r"reward exact: range is \[1, 1\]; it must be two numbers"),
        ({"rewards": {"exact": {}}, "reward_range": [1]}, "reward_range is"),
        ({"rewards": {"exact": {}}, "num_workers": 0}, "num_workers is 0; it must be 1 or more"),
        ({"rewards": {"exact": {}}, "timeout": 0}, "timeout is 0.0; it must be greater than 0"),
        ({"rewards": {"math": {"time_limit": 30}}}, "timeout is 20 s, but the limits of its rewards allow 30 s"),
        ({"rewards": {"exact": {}}, "correct_from": 0}, "correct_from is 0.0"),
        ({"rewards": {"exact": {}}, "imports": ["no_such"]}, "imports: no_such can't be imported"),
        ({"rewards": {"exact": {}}, "type": "rewrads"}, "environment task: type: .*did you mean rewards"),
        ({"rewards": {"number": {"most": 1}}, "imports": SAMPLES}, "reward number: .*unexpected keyword .*most"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(environments, given, message):
    with pytest.raises(UserError, match=message):
        environments(task=config(**given))


def test_a_task_without_an_environment(environments):
    made = environments(math=config({"exact": {}}))
    with pytest.raises(UserError, match="task_name 'maths' has no environment; did you mean math"):
        made.start_step([episode("1", "maths")])


def test_a_name_is_given_once():
    with pytest.raises(UserError, match="exact is .*Exact already; rename one"):
        register_reward("exact")(lambda episode: 1.0)


def test_rewards_of_an_installed_package(environments, tmp_path, monkeypatch):
    """By its entry point, in the processes too."""
    (tmp_path / "their_rewards.py").write_text("def length(episode):\n    return len(episode.reply.answer) / 10\n")
    info = tmp_path / "their_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    points = "[nemo_bluelm.rewards]\nlength = their_rewards:length\nlost = their_rewards:lost\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = environments(task=config({"length": {}}))
    assert made.step([episode("12345")])[0].value == 0.5
    with pytest.raises(UserError, match="reward lost: lost can't be imported from their_rewards:lost"):
        environments(task=config({"lost": {}}))


def test_a_reward_of_the_program_itself(environments):
    def mine(episode):
        return 1.0

    mine.__module__ = "__main__"
    register_reward("mine")(mine)
    with pytest.raises(UserError, match="put it into a module and list that in imports"):
        environments(task=config({"mine": {}}))
