"""Rewards of the trainer's tests."""

import hashlib
import os
import time
from pathlib import Path

from nemo_bluelm.evaluate.scorers import Score
from nemo_bluelm.rl.environments import register_reward


def _share(text: str) -> float:
    return hashlib.sha256(text.encode()).digest()[0] / 255


@register_reward("hashed")
def hashed(episode):
    """A number that looks random and depends on the reply alone."""
    return Score(_share(f"{episode.reply.thought}/{episode.reply.answer}"))


@register_reward("coarse")
def coarse(episode):
    """The same for most replies, so that many groups teach nothing."""
    return Score(float(hashed(episode).value > 0.7))


@register_reward("holds")
def holds(episode, letter):
    """Whether a letter is in the answer."""
    return Score(float(letter in episode.reply.answer))


@register_reward("odd_length")
def odd_length(episode):
    """Unscorable now and then."""
    count = len(episode.reply.answer)
    return Score(None, "one in three") if count % 3 == 0 else Score(float(count % 2))


@register_reward("never")
def never(episode):
    """What nobody can tell."""
    return Score(None, "nobody can tell")


@register_reward("held_up")
def held_up(episode, folder):
    """As ``hashed``, and counted in a file; the reply whose number is in the file ``hold`` never gets its reward."""
    folder = Path(folder)
    with (folder / "asked").open("ab") as file:
        file.write(b".")
        file.flush()
        asked = os.fstat(file.fileno()).st_size
    hold = folder / "hold"
    while hold.exists() and asked >= int(hold.read_text()):
        time.sleep(0.05)
    return hashed(episode)
