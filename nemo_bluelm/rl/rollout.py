"""A rollout: prompts in, replies with rewards and advantages out, the same for every layout of the job."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from megatron.core import parallel_state

from nemo_bluelm.config.grpo import GrpoConfig
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Reply, Sampling, TokenPrompt
from nemo_bluelm.rl.advantage import group_advantages, mixed_groups
from nemo_bluelm.rl.backends.base import InferenceBackendBase
from nemo_bluelm.rl.batch import Sample
from nemo_bluelm.rl.dataset import AllTaskDataset, Task
from nemo_bluelm.rl.environments.base import Reward
from nemo_bluelm.rl.environments.environment import Environments
from nemo_bluelm.rl.shaping import soft_overlong_punishment

_MOST_SKIPPED = 1000  # prompts in a row that are too long, or whose images can't be read


@dataclass(frozen=True)
class Rewarded:
    """A reply of one rank with what it was worth.

    Attributes:
        group: uid of its prompt's draw.
        number: of the reply in its group.
    """

    group: int
    number: int
    task: Task
    prompt: TokenPrompt
    reply: Reply
    reward: Reward


@dataclass
class Rollout:
    """What a rank learns from in a GRPO step, and what is told of all ranks'."""

    rewarded: list[Rewarded]
    figures: dict[str, float]
    shown: list[dict]  # a few replies for people to read
    complaints: dict[str, str]  # by task, of which most replies have no reward


class RolloutGenerator:
    """Draws prompts, lets the backend reply, and the environments reward while further replies are written.

    Every data-parallel rank draws all prompts and replies to its share of them. Tensor-parallel ranks write the same
    replies; the first of them asks for the rewards.

    Args:
        generator: encodes prompts.
        seed: of the run.
    """

    def __init__(
        self,
        grpo: GrpoConfig,
        dataset: AllTaskDataset,
        environments: Environments,
        generator: Generator,
        seed: int,
    ):
        self._grpo, self._dataset, self._environments = grpo, dataset, environments
        self._generator, self._seed = generator, seed
        self._skipped = 0

    def rollout(self, backend: InferenceBackendBase, step: int) -> Rollout:
        """Replies for GRPO step ``step``; all ranks must call it.

        Raises:
            UserError: prompts that can't be used, one after another.
        """
        grpo, dynamic, begun, self._skipped = self._grpo, self._grpo.dynamic_sampling, time.perf_counter(), 0
        replies: list[Rewarded] = []
        everything: list[Told] = []
        batches, wanted = 0, grpo.num_prompts_per_step
        seconds: dict[str, float] = defaultdict(float)
        backend.refit()
        seconds["timing/refit"] = time.perf_counter() - begun
        try:
            while True:
                batches += 1
                replies += self._reply(backend, self._draw(wanted), step, seconds)
                everything = gathered(_told(replies))
                enough = not dynamic.enabled or len(teaching_groups(everything)) >= wanted
                if enough or batches == dynamic.max_gen_batches:
                    break
        finally:
            backend.free()
        kept = replies if batches == 1 else shared_out(replies, chosen_groups(everything, wanted))
        rewards, figures = self._environments.global_post_process_and_metrics(
            [row.task for row in everything], [row.reward for row in everything]
        )
        everything = [replace(row, reward=reward) for row, reward in zip(everything, rewards)]
        changed = {(row.group, row.number): row.reward for row in everything}
        kept = [replace(one, reward=changed[one.group, one.number]) for one in kept]
        figures |= self._figures(everything) | seconds
        figures["dynamic_sampling/num_gen_batches"] = batches
        return Rollout(kept, figures, [_shown(one) for one in _telling(kept)], complaints(everything))

    def _draw(self, count: int) -> list[tuple[Task, TokenPrompt]]:
        """Prompts that fit, all ranks' in the order of their draw."""
        found, skipped = [], 0
        while len(found) < count:
            task = self._dataset.draw()
            think = _share_of(f"{self._seed}/{task.uid}/think") < self._grpo.thinking.share
            try:
                prompt = self._generator.encode(Prompt(task.messages, task.images, think))
                problem = f"it has {len(prompt.tokens)} tokens, more than grpo.max_prompt_length"
                fits = len(prompt.tokens) <= self._grpo.max_prompt_length
            except UserError as error:
                fits, problem = False, str(error)
            if fits:
                found.append((task, replace(prompt, number=task.uid)))
                continue
            skipped += 1
            self._skipped += 1
            if skipped == _MOST_SKIPPED:
                raise UserError(f"{skipped} prompts in a row can't be used, the last one of {task.source}: {problem}")
        return found

    def _reply(
        self, backend: InferenceBackendBase, drawn: list[tuple[Task, TokenPrompt]], step: int, seconds: dict
    ) -> list[Rewarded]:
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine, grpo = drawn[rank::ranks], self._grpo
        sampling = sampling_of(grpo, self._seed, step)
        speaks = parallel_state.get_tensor_model_parallel_rank() == 0
        replies: dict[tuple[int, int], tuple[Reply, Future | None]] = {}

        def on_reply(place: int, number: int, reply: Reply) -> None:
            task, prompt = mine[place]
            future = None
            if speaks:
                episode = task.episode(reply, prompt.think)
                future = self._environments.start_step([episode])[0]
            replies[place, number] = reply, future

        begun = time.perf_counter()
        backend.generate([prompt for _, prompt in mine], sampling, on_reply)
        written = time.perf_counter()
        places = sorted(replies)
        rewards = [replies[place][1].result() for place in places] if speaks else None
        rewards = first_of_tensor_group(rewards)
        seconds["timing/generate"] += written - begun
        seconds["timing/reward"] += time.perf_counter() - written  # what generation didn't hide
        return [
            Rewarded(mine[place][0].uid, number, *mine[place], replies[place, number][0], reward)
            for (place, number), reward in zip(places, rewards)
        ]

    def samples(self, mine: Sequence[Rewarded]) -> list[Sample]:
        """This rank's replies as training takes them."""
        filtering = self._grpo.overlong.filtering
        return [
            Sample(one.prompt, one.reply, one.reward.value is not None and not (filtering and one.reward.truncated))
            for one in mine
        ]

    def advantages(
        self, mine: Sequence[Rewarded], bonuses: Sequence[float] | None = None
    ) -> tuple[list[float], dict[str, float]]:
        """Those of this rank's replies, by all ranks' replies together; all ranks must call it.

        Args:
            bonuses: to add to the rewards.
        """
        keys, overlong = self._grpo.advantage, self._grpo.overlong
        rows = gathered(_told(mine, bonuses))
        rewards = torch.tensor([float("nan") if row.value is None else row.value for row in rows], dtype=torch.float64)
        rewards += torch.tensor([row.bonus for row in rows], dtype=torch.float64)
        lengths = torch.tensor([row.length for row in rows])
        if overlong.buffer_length is not None:
            most = self._grpo.generation.max_new_tokens
            rewards += soft_overlong_punishment(lengths, most, overlong.buffer_length, overlong.buffer_penalty)
        names = sorted({name for row in rows for name in row.components})
        components = torch.tensor([[_number(row.components.get(name)) for name in names] for row in rows])
        weigh = self._environments.weight
        weights = [[keys.reward_weights.get(name, weigh(row.task, name)) for name in names] for row in rows]
        advantages = group_advantages(
            rewards,
            [row.group for row in rows],
            keys.estimator.value,
            std_eps=keys.std_eps,
            normalize=None if keys.normalize is None else keys.normalize.value,
            leave_one_out=keys.leave_one_out,
            components=components if keys.estimator.value == "gdpo" else None,
            weights=torch.tensor(weights),
            tasks=[row.task for row in rows],
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
        )
        of = {(row.group, row.number): value for row, value in zip(rows, advantages.tolist())}
        values = advantages[rewards.isfinite()]
        figures = {f"advantages/{n}": float(getattr(values, n)()) for n in ("mean", "min", "max") if len(values)}
        figures["advantages/std"] = float(values.std()) if len(values) > 1 else 0.0
        return [of[one.group, one.number] for one in mine], figures

    def _figures(self, rows: "list[Told]") -> dict[str, float]:
        """Of all replies that were written."""
        figures: dict[str, float] = {}
        values = torch.tensor([_number(row.value) for row in rows])
        mixed = mixed_groups(values, [row.group for row in rows])
        groups = {row.group: place for place, row in enumerate(rows)}
        figures["frac_groups_zero_std"] = fmean(not mixed[place] for place in groups.values())
        correct = defaultdict(list)
        for row in rows:
            if row.reward.correct is not None:
                correct[row.group].append(row.reward.correct)
        if correct:
            figures["frac_groups_all_correct"] = fmean(all(group) for group in correct.values())
            figures["frac_groups_all_wrong"] = fmean(not any(group) for group in correct.values())
            figures["pass_at_1"] = fmean(fmean(group) for group in correct.values())
            figures[f"pass_at_{self._grpo.num_generations_per_prompt}"] = fmean(map(any, correct.values()))
        lengths = [row.length for row in rows]
        figures["rollout/response_length_mean"] = fmean(lengths)
        figures["rollout/response_length_max"], figures["rollout/response_length_min"] = max(lengths), min(lengths)
        figures["rollout/truncation_rate"] = fmean(row.truncated for row in rows)
        for mode, name in ((True, "thinking"), (False, "non_thinking")):
            some = [row for row in rows if row.think == mode]
            if some:
                figures[f"rollout/{name}/answer_length"] = fmean(row.answer_length for row in some)
                figures[f"rollout/{name}/think_length"] = fmean(row.think_length for row in some)
                figures[f"rollout/{name}/budget_forced_rate"] = fmean(row.forced for row in some)
                figures[f"rollout/{name}/think_format_ok"] = fmean(row.well_formed for row in some)
        figures["rollout/prompts_skipped"] = self._skipped
        return figures


@dataclass(frozen=True)
class Told:
    """What ranks tell each other of a reply."""

    group: int
    number: int
    task: str
    reward: Reward
    length: int
    think: bool | None
    think_length: int
    answer_length: int
    truncated: bool
    forced: bool
    well_formed: bool  # a thought and an answer behind it, or no thought, as it was asked for
    bonus: float

    @property
    def value(self) -> float | None:
        return self.reward.value

    @property
    def components(self) -> dict:
        return self.reward.components


def sampling_of(grpo: GrpoConfig, seed: int, step: int) -> Sampling:
    """How the replies of a GRPO step are sampled."""
    keys = grpo.generation
    return Sampling(
        max_new_tokens=keys.max_new_tokens,
        temperature=keys.temperature,
        top_p=keys.top_p,
        top_k=keys.top_k,
        think_budget=grpo.thinking.budget_tokens,
        closing_text=grpo.thinking.closing_text,
        samples=grpo.num_generations_per_prompt,
        seed=int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "little"),
        logprobs_temperature=keys.temperature,
    )


def _told(rewarded: Sequence[Rewarded], bonuses: Sequence[float] | None = None) -> list[Told]:
    return [
        Told(
            one.group,
            one.number,
            one.task.task_name,
            one.reward,
            len(one.reply.tokens),
            one.prompt.think,
            one.reply.thinking_tokens,
            one.reply.answer_tokens,
            one.reply.stop_reason == "length",
            any(one.reply.injected[1:]),
            one.reply.finished and one.prompt.think in (None, one.reply.thought is not None),
            bonus,
        )
        for one, bonus in zip(rewarded, bonuses or [0.0] * len(rewarded), strict=True)
    ]


def teaching_groups(rows: Sequence[Told]) -> list[int]:
    """Groups whose rewards differ, in the order of their draw."""
    values = torch.tensor([_number(row.value) for row in rows])
    mixed = mixed_groups(values, [row.group for row in rows])
    return sorted({row.group for row, differs in zip(rows, mixed.tolist()) if differs})


def chosen_groups(rows: Sequence[Told], wanted: int) -> list[int]:
    """As many groups as a step needs: the first that teach, then, where they are too few, the last of the others."""
    teaching = teaching_groups(rows)[:wanted]
    others = sorted({row.group for row in rows} - set(teaching))
    return teaching + others[len(others) - (wanted - len(teaching)) :]


def shared_out(mine: Sequence[Rewarded], groups: Sequence[int]) -> list[Rewarded]:
    """The replies of the groups that this rank learns from, every ``ranks``-th one; those of other ranks are sent."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    owner = {group: place % ranks for place, group in enumerate(groups)}
    moving = [one for one in mine if owner.get(one.group, rank) != rank]
    arrived = [one for one in gathered(moving) if owner[one.group] == rank] if ranks > 1 else []
    here = [*(one for one in mine if owner.get(one.group) == rank), *arrived]
    place = {group: number for number, group in enumerate(groups)}
    return sorted(here, key=lambda one: (place[one.group], one.number))


def complaints(rows: Sequence[Told]) -> dict[str, str]:
    """Tasks of whose replies most have no reward, and why; a reply without one teaches nothing."""
    found = {}
    for task in sorted({row.task for row in rows}):
        rewards = [row.reward for row in rows if row.task == task]
        reasons = Counter(one.reason for one in rewards if one.value is None and not one.masked)
        if reasons.total() * 2 > len(rewards):
            reason = reasons.most_common(1)[0][0]
            found[task] = f"{task}: {reasons.total()} of {len(rewards)} replies have no reward, most for this: {reason}"
    return found


def _telling(kept: Sequence[Rewarded]) -> list[Rewarded]:
    """A few replies that differ: to three prompts, and one without a reward if there is one."""
    firsts = list({one.group: one for one in reversed(kept)}.values())[::-1][:3]
    return firsts + [one for one in kept if one.reward.value is None and one not in firsts][:1]


def _shown(one: Rewarded) -> dict:
    return {
        "task_name": one.task.task_name,
        "messages": [m if isinstance(m["content"], str) else {**m, "content": "..."} for m in one.task.messages],
        "thought": one.reply.thought,
        "answer": one.reply.answer,
        "reward": one.reward.value,
        "components": dict(one.reward.components),
        "reason": one.reward.reason,
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _share_of(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def gathered(items: list) -> list:
    """The items of all data-parallel ranks, the same list on each: by prompts in the order of their draw."""
    ranks = parallel_state.get_data_parallel_world_size()
    if ranks == 1:
        return items
    everything = [None] * ranks
    torch.distributed.all_gather_object(everything, items, group=parallel_state.get_data_parallel_group())
    flat = [item for part in everything for item in part]
    return sorted(flat, key=lambda item: (item.group, item.number)) if flat and isinstance(flat[0], Told) else flat


def first_of_tensor_group(rewards: list | None) -> list:
    """The rewards that the first tensor-parallel rank of this model copy has asked for."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return rewards
    box = [rewards]
    torch.distributed.broadcast_object_list(box, torch.distributed.get_global_rank(group, 0), group=group)
    return box[0]
