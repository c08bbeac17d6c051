"""A reward: short answers are better."""

from nemo_bluelm.rl.environments import Episode


def short(episode: Episode, words: int = 8) -> float:
    """1 for an answer of up to ``words`` words, less and less for longer ones; in (0, 1]."""
    return min(1.0, words / max(1, len(episode.reply.answer.split())))
