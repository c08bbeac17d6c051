"""Environments: a task's rewards, computed beside generation, with NeMo-Aligner's steps; and all of a run's by name."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

from nemo_bluelm.config.rewards import EnvironmentConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.environments.base import Episode, Reward
from nemo_bluelm.rl.environments.compose import Composition
from nemo_bluelm.rl.environments.metrics import overall_metrics, task_metrics
from nemo_bluelm.rl.environments.pool import Pool
from nemo_bluelm.rl.environments.registry import ENVIRONMENTS, register_environment


@register_environment("rewards")
class Environment:
    """Rewards replies to one task by the rewards of its configuration.

    A subclass of your own may do so otherwise: ``register_environment`` names it for the key ``type``.

    Args:
        name: of the task.

    Attributes:
        weights: of the rewards, by the names that a ``Reward``'s components have.

    Raises:
        UserError: what is wrong with the configuration, in one line.
    """

    name: ClassVar[str]

    def __init__(self, config: EnvironmentConfig, name: str):
        self.task_name = name
        _import(config.imports, f"environment {name}: imports")
        composition = Composition(config, name)
        self.weights, self._reads_prompts = composition.weights, composition.reads_prompts
        modules = [*config.imports, *composition.modules]
        if "__main__" in modules:
            raise UserError(
                f"environment {name}: a reward is defined in the program that was started, which its processes can't "
                "import; put it into a module and list that in imports"
            )
        self._pool = Pool(replace(config, imports=list(dict.fromkeys(modules))), name, composition.unscored)

    def start_step(self, episodes: Sequence[Episode]) -> list["Future[Reward]"]:
        """Submit replies; it doesn't wait. May be called again before the former ones are finished."""
        if not self._reads_prompts:
            episodes = [replace(episode, messages=(), images=()) for episode in episodes]
        return [self._pool.submit(episode) for episode in episodes]

    def finish_step(self, futures: Sequence["Future[Reward]"]) -> list[Reward]:
        """Wait for the rewards; they come in the order of the replies."""
        return [future.result() for future in futures]

    def step(self, episodes: Sequence[Episode]) -> list[Reward]:
        """The rewards of replies."""
        return self.finish_step(self.start_step(episodes))

    def global_post_process_and_metrics(self, rewards: Sequence[Reward]) -> tuple[list[Reward], dict[str, float]]:
        """The rewards of all ranks' replies, changed where it takes all of them to know, and what is told of them."""
        return list(rewards), task_metrics(self.task_name, rewards)

    def close(self) -> None:
        """End its processes."""
        self._pool.close()


class Environments:
    """The environments of a run; replies go to that of their ``task_name``. A context that ends all processes.

    Raises:
        UserError: what is wrong with one of them.
    """

    def __init__(self, configs: Mapping[str, EnvironmentConfig]):
        if not configs:
            raise UserError("environments is empty; name one at least, such as 'math: {rewards: {math: {}}}'")
        self._made: dict[str, Environment] = {}
        try:
            for name, config in configs.items():
                _import(config.imports, f"environment {name}: imports")
                self._made[name] = ENVIRONMENTS.find(config.type, f"environment {name}: type")(config, name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def check(self, task_names: Iterable[str]) -> None:
        """
        Raises:
            UserError: a task that has no environment.
        """
        for name in task_names:
            if name not in self._made:
                close = difflib.get_close_matches(str(name), self._made, 1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self._made)}"
                raise UserError(f"task_name {name!r} has no environment; {hint}")

    def weight(self, task_name: str, reward: str) -> float:
        """Of one of a task's rewards; 1 where its environment has no weights."""
        return getattr(self._made[task_name], "weights", {}).get(reward, 1.0)

    def start_step(self, episodes: Sequence[Episode]) -> list["Future[Reward]"]:
        """Submit replies of any tasks; it doesn't wait.

        Raises:
            UserError: a task that has no environment.
        """
        self.check(episode.task_name for episode in episodes)
        return [self._made[episode.task_name].start_step([episode])[0] for episode in episodes]

    def finish_step(self, futures: Sequence["Future[Reward]"]) -> list[Reward]:
        """Wait for the rewards; they come in the order of the replies."""
        return [future.result() for future in futures]

    def step(self, episodes: Sequence[Episode]) -> list[Reward]:
        """The rewards of replies."""
        return self.finish_step(self.start_step(episodes))

    def global_post_process_and_metrics(
        self, tasks: Sequence[str], rewards: Sequence[Reward]
    ) -> tuple[list[Reward], dict[str, float]]:
        """As ``Environment``'s, of the replies of all ranks.

        Args:
            tasks: of each reward.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for place, task in enumerate(tasks):
            places[task].append(place)
        processed, found = list(rewards), {}
        for task, at in places.items():
            changed, metrics = self._made[task].global_post_process_and_metrics([rewards[place] for place in at])
            found |= metrics
            for place, reward in zip(at, changed, strict=True):
                processed[place] = reward
        return processed, found | overall_metrics(processed)

    def close(self) -> None:
        """End all processes."""
        for environment in self._made.values():
            environment.close()


def _import(modules: Sequence[str], where: str) -> None:
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{where}: {module} can't be imported: {error}") from error
