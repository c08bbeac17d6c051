"""Rewards as a user writes them, well-behaved ones and others."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from nemo_bluelm.evaluate.scorers import Score
from nemo_bluelm.rl.environments import Environment, RewardFunction, register_environment, register_reward


@register_reward("number")
def number(episode, least=None):
    """What the answer says, whatever it is."""
    found = float(episode.reply.answer)
    return None if least is not None and found < least else found


@register_reward("obedient")
@dataclass
class Obedient(RewardFunction):
    """Does what the answer says."""

    folder: str = "/tmp"

    def score(self, episode):
        said = episode.reply.answer
        if said == "sleep":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(f"{self.folder}/children", "a") as file:
                file.write(f"{os.getpid()} {child.pid}\n")
            time.sleep(600)
        if said == "die":
            os._exit(3)
        if said == "print":
            print("loud")
            os.write(1, b"louder")
        if said == "odd":
            return "odd"
        if said == "text":
            return Score("0.5")
        if said.startswith("wait"):
            time.sleep(float(said.removeprefix("wait ")))
        return Score(1.0 if said != "bad" else 0.0)


@register_environment("halved")
class Halved(Environment):
    """Halves what others give, once all are known."""

    def global_post_process_and_metrics(self, rewards):
        from dataclasses import replace

        rewards = [replace(reward, value=None if reward.value is None else reward.value / 2) for reward in rewards]
        processed, metrics = super().global_post_process_and_metrics(rewards)
        return processed, {**metrics, f"env/{self.task_name}/halved": 1.0}
