"""Keys of reinforcement learning by GRPO: NeMo-Aligner's and NeMo-RL's words, their defaults and units."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Dict, Iterator, List, Optional

from nemo_bluelm.errors import UserError


class Objective(str, Enum):
    """What a run learns."""

    next_token = "next_token"  # of documents and conversations
    grpo = "grpo"  # replies that are rewarded
    reward_model = "reward_model"  # which of two answers is preferred


class Estimator(str, Enum):
    """How rewards become advantages; formulas and sources are at ``nemo_bluelm.rl.advantage.group_advantages``."""

    grpo = "grpo"
    rloo = "rloo"
    dr_grpo = "dr_grpo"
    gdpo = "gdpo"
    reinforce_pp = "reinforce_pp"
    reinforce_pp_baseline = "reinforce_pp_baseline"


class Normalize(str, Enum):
    """Whose standard deviation divides the advantages."""

    group = "group"
    batch = "batch"
    task = "task"
    none = "none"


class PolicyLoss(str, Enum):
    """Formulas and sources are at ``nemo_bluelm.rl.loss.policy_loss``."""

    ppo_clip = "ppo_clip"
    gspo = "gspo"
    cispo = "cispo"
    reinforce = "reinforce"


class Aggregation(str, Enum):
    """How the losses of tokens become one."""

    token_mean = "token_mean"
    seq_mean_token_mean = "seq_mean_token_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


class KlType(str, Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Correction(str, Enum):
    """Weights for tokens whose sampler had other probabilities than training computes."""

    none = "none"
    tis = "tis"
    icepop = "icepop"
    seq_mask_tis = "seq_mask_tis"


class Backend(str, Enum):
    """What writes the replies."""

    mcore = "mcore"  # the weights that are trained, in their place
    vllm = "vllm"  # a server of vLLM's, a process of its own


@dataclass
class AdvantageConfig:
    estimator: Estimator = Estimator.grpo
    normalize: Optional[Normalize] = None  # null: group for grpo, none for dr_grpo and rloo
    leave_one_out: Optional[bool] = None  # null: for rloo only
    std_eps: float = 1.0e-6
    clip_low: Optional[float] = None
    clip_high: Optional[float] = None
    reward_weights: Dict[str, float] = field(default_factory=dict)  # of gdpo's components; else the environment's


@dataclass
class DynamicSamplingConfig:
    """Groups whose rewards are all the same teach nothing; with this they are replaced by others (arXiv 2503.14476)."""

    enabled: bool = False
    max_gen_batches: int = 10  # then the step takes what there is


@dataclass
class CurriculumConfig:
    """Easy prompts first. The paper reports that it did not help, nor did high temperature or an entropy bonus."""

    field: Optional[str] = None  # of a record: a number, the harder its prompt the larger; null: no curriculum
    start: float = 0.1  # share of each source's prompts, its easiest, that the first ones are drawn from
    steps: Optional[int] = None  # GRPO steps until all are drawn from; null: half of the run's


@dataclass
class OverlongConfig:
    filtering: bool = False  # replies cut at their length push nothing
    buffer_length: Optional[int] = None  # tokens before max_new_tokens over which a punishment grows; null: none
    buffer_penalty: float = 1.0


@dataclass
class RolloutCorrectionConfig:
    type: Correction = Correction.none
    max: float = 2.0
    min: float = 0.0


@dataclass
class GrpoLossConfig:
    policy_loss: PolicyLoss = PolicyLoss.ppo_clip
    aggregation: Aggregation = Aggregation.token_mean
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2  # 0.28 is DAPO's clip-higher
    ratio_clip_c: Optional[float] = None  # dual clip; null: none
    reference_policy_kl_penalty: float = 0.0  # times KL(policy || what the run started from)
    reference_policy_kl_type: KlType = KlType.k3
    kl_in_reward: bool = False  # the penalty is taken off the rewards, not added to the loss
    entropy_coeff: float = 0.0  # times the entropy, which is then raised
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)


@dataclass
class ThinkingConfig:
    share: float = 0.5  # of the prompts, those that are asked to think
    budget_tokens: Optional[int] = None  # of a thought; null: as many as leave room for an answer
    closing_text: str = ""  # written where the budget ends a thought


@dataclass
class VllmConfig:
    """Where the server of backend vllm is; started on ``folder``, an ``export vllm`` that gets new weights."""

    url: Optional[str] = None  # such as http://localhost:8000
    folder: Optional[str] = None  # both see it under this path
    timeout: float = 600.0  # seconds that a reply, or loading weights, may take


@dataclass
class GenerationConfig:
    backend: Backend = Backend.mcore
    vllm: VllmConfig = field(default_factory=VllmConfig)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    max_new_tokens: int = 1024
    batch: int = 64  # replies that are written at once on a rank; of vllm, that are asked for


@dataclass
class ValidationConfig:
    sources: Dict[str, List[str]] = field(default_factory=dict)  # shards of prompts by name; none: no validation
    period: int = 10  # GRPO steps
    at_start: bool = True
    num_generations: int = 1  # k of pass@k
    greedy: bool = True  # else at generation's temperature
    max_samples: int = 256  # prompts, as many of each source
    metric: str = "val/accuracy"  # whose best checkpoint is kept


@dataclass
class GrpoConfig:
    """A GRPO step: replies to ``num_prompts_per_step`` prompts, their rewards, and ``num_iterations`` passes over them
    in optimizer steps of ``train.global_batch_size`` replies each."""

    num_prompts_per_step: int = 64
    num_generations_per_prompt: int = 8
    num_iterations: int = 1
    max_prompt_length: int = 2048  # tokens; longer prompts are left out
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    loss: GrpoLossConfig = field(default_factory=GrpoLossConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def samples_per_step(self) -> int:
        """Replies that a GRPO step learns from."""
        return self.num_prompts_per_step * self.num_generations_per_prompt


def updates_per_step(grpo: GrpoConfig, global_batch_size: int) -> int:
    """Optimizer steps of a GRPO step."""
    return grpo.samples_per_step // global_batch_size * grpo.num_iterations


def grpo_problems(recipe) -> Iterator[str]:
    """What is wrong with the keys of a recipe whose ``objective`` is grpo."""
    from nemo_bluelm.config.rewards import reward_entries

    grpo, train, parallel = recipe.grpo, recipe.train, recipe.parallel
    loss, generation, advantage = grpo.loss, grpo.generation, grpo.advantage
    whole = ("num_prompts_per_step", "num_iterations", "max_prompt_length")
    for name in whole:
        if getattr(grpo, name) < 1:
            yield f"grpo.{name} is {getattr(grpo, name)}; it must be 1 or more"
    if grpo.num_generations_per_prompt < 2:
        yield (
            f"grpo.num_generations_per_prompt is {grpo.num_generations_per_prompt}; it must be 2 or more, replies are "
            "compared with others to the same prompt"
        )
    if train.global_batch_size < 1 or grpo.samples_per_step % train.global_batch_size:
        yield (
            f"train.global_batch_size is {train.global_batch_size}; it must divide the {grpo.samples_per_step} replies "
            "of a step (grpo.num_prompts_per_step x num_generations_per_prompt)"
        )
    elif train.steps % updates_per_step(grpo, train.global_batch_size):
        updates = updates_per_step(grpo, train.global_batch_size)
        yield (
            f"train.steps is {train.steps} optimizer steps; a GRPO step has {updates}, so make it a multiple, such as "
            f"{-(-train.steps // updates) * updates}"
        )
    if train.micro_batch_size != 1:
        yield f"train.micro_batch_size is {train.micro_batch_size}; with objective grpo it must be 1"
    if parallel.pipeline > 1 or parallel.context > 1:
        key = "pipeline" if parallel.pipeline > 1 else "context"
        yield (
            f"parallel.{key} is {getattr(parallel, key)}; replies are written by tensor and data parallelism, set it "
            "to 1 and raise parallel.tensor"
        )
    if parallel.sequence:
        yield "parallel.sequence is true; replies are written by whole rows, set it to false"
    if recipe.precision.fp8.recipe is not None:
        yield "precision.fp8.recipe is set; replies are written in the model's own dtype, choose precision=bf16"
    if train.cuda_graphs:
        yield "train.cuda_graphs is true; steps of GRPO have no fixed shape, set it to false"
    if train.lora.rank and loss.reference_policy_kl_penalty:
        yield "train.lora.rank with grpo.loss.reference_policy_kl_penalty is not supported; set one of them to 0"
    longest = grpo.max_prompt_length + generation.max_new_tokens
    if longest > recipe.data.sequence_length:
        yield (
            f"grpo.max_prompt_length + generation.max_new_tokens is {longest}, more than data.sequence_length "
            f"{recipe.data.sequence_length}; a prompt with its reply must fit into a pack"
        )
    if not 0 <= grpo.thinking.share <= 1:
        yield f"grpo.thinking.share is {grpo.thinking.share}; it must be from 0 to 1"
    budget = grpo.thinking.budget_tokens
    if budget is not None and budget < 0:
        yield f"grpo.thinking.budget_tokens is {budget}; it must be 0 or more, or null"
    if not 0 < generation.temperature < float("inf"):
        yield f"grpo.generation.temperature is {generation.temperature}; it must be greater than 0"
    if not 0 < generation.top_p <= 1:
        yield f"grpo.generation.top_p is {generation.top_p}; it must be greater than 0 and at most 1"
    for name, least in (("max_new_tokens", 4), ("batch", 1), ("top_k", 0)):
        if getattr(generation, name) < least:
            yield f"grpo.generation.{name} is {getattr(generation, name)}; it must be {least} or more"
    yield from _vllm_problems(recipe)
    for name in ("ratio_clip_min", "ratio_clip_max"):
        if not 0 < getattr(loss, name):
            yield f"grpo.loss.{name} is {getattr(loss, name)}; it must be greater than 0"
    if loss.ratio_clip_c is not None and (loss.ratio_clip_c <= 1 or loss.policy_loss not in ("ppo_clip", "gspo")):
        yield f"grpo.loss.ratio_clip_c is {loss.ratio_clip_c}; it must be above 1 and of ppo_clip or gspo, or null"
    if loss.policy_loss == PolicyLoss.gspo and loss.aggregation == Aggregation.token_mean:
        yield "grpo.loss.aggregation is token_mean, but gspo's ratio is of sequences; set seq_mean_token_mean"
    for name in ("reference_policy_kl_penalty", "entropy_coeff"):
        if not 0 <= getattr(loss, name) < math.inf:
            yield f"grpo.loss.{name} is {getattr(loss, name)}; it must be 0 or more"
    correction = loss.rollout_correction
    if not 0 <= correction.min < correction.max:
        yield (
            f"grpo.loss.rollout_correction keeps weights from {correction.min} to {correction.max}; set 0 <= min < max"
        )
    if not 0 <= advantage.std_eps < math.inf:
        yield f"grpo.advantage.std_eps is {advantage.std_eps}; it must be 0 or more"
    for name, sign in (("clip_low", -1), ("clip_high", 1)):
        bound = getattr(advantage, name)
        if bound is not None and not bound * sign > 0:
            yield f"grpo.advantage.{name} is {bound}; it must be {'below' if sign < 0 else 'above'} 0, or null"
    if loss.reference_policy_kl_penalty and recipe.init_from is None:
        yield "grpo.loss.reference_policy_kl_penalty is set, but init_from, the reference, is null; name a checkpoint"
    if loss.kl_in_reward and not loss.reference_policy_kl_penalty:
        yield "grpo.loss.kl_in_reward is true, but reference_policy_kl_penalty is 0; set it, or kl_in_reward=false"
    if advantage.estimator == Estimator.gdpo and (loss.kl_in_reward or grpo.overlong.buffer_length is not None):
        key = "loss.kl_in_reward" if loss.kl_in_reward else "overlong.buffer_length"
        yield f"grpo.{key} changes the whole reward, but gdpo looks at its components; choose another estimator"
    if advantage.reward_weights and advantage.estimator != Estimator.gdpo:
        yield "grpo.advantage.reward_weights is of estimator gdpo; choose it, or weigh rewards in environments"
    if grpo.overlong.buffer_length is not None and not 0 <= grpo.overlong.buffer_length <= generation.max_new_tokens:
        yield f"grpo.overlong.buffer_length is {grpo.overlong.buffer_length}; it must be from 0 to max_new_tokens"
    if not 0 <= grpo.overlong.buffer_penalty < math.inf:
        yield f"grpo.overlong.buffer_penalty is {grpo.overlong.buffer_penalty}; it must be 0 or more"
    if grpo.dynamic_sampling.max_gen_batches < 1:
        yield "grpo.dynamic_sampling.max_gen_batches must be 1 or more"
    if not 0 < grpo.curriculum.start <= 1:
        yield f"grpo.curriculum.start is {grpo.curriculum.start}; it must be greater than 0 and at most 1"
    if grpo.curriculum.steps is not None and grpo.curriculum.steps < 1:
        yield f"grpo.curriculum.steps is {grpo.curriculum.steps}; it must be 1 or more, or null"
    if grpo.validation.period < 1 or grpo.validation.num_generations < 1 or grpo.validation.max_samples < 1:
        yield "grpo.validation: period, num_generations and max_samples must be 1 or more"
    if grpo.validation.greedy and grpo.validation.num_generations > 1:
        yield "grpo.validation.num_generations is more than 1, but greedy replies are all one; set greedy=false"
    if not recipe.environments:
        yield "environments is empty; name one at least, such as 'math: {rewards: {math: {}}}'"
    rewards: set[str] = set()
    for name, environment in recipe.environments.items():
        try:
            rewards |= set(reward_entries(environment, f"environments.{name}"))
        except UserError as error:
            yield str(error)
    for name, weight in advantage.reward_weights.items():
        if name not in rewards:
            yield f"grpo.advantage.reward_weights.{name}: no environment has it; there are {', '.join(sorted(rewards))}"
        elif not 0 <= weight < math.inf:
            yield f"grpo.advantage.reward_weights.{name} is {weight}; it must be 0 or more"
    ranges = {tuple(environment.reward_range) for environment in recipe.environments.values()}
    if len(ranges) > 1 and not _scales_tasks(advantage):
        yield (
            f"environments have several reward_ranges, and {advantage.estimator.value} with grpo.advantage.normalize "
            f"{advantage.normalize.value if advantage.normalize else 'null'} compares their rewards as they are: the "
            "largest range would drown the others; give them one range, or take grpo with normalize group or task"
        )
    metrics = ["val/accuracy", "val/pass_at_1", f"val/pass_at_{grpo.validation.num_generations}", "val/reward/mean"]
    metrics += [f"val/{name}/accuracy" for name in recipe.environments if len(recipe.environments) > 1]
    if grpo.validation.metric not in metrics:
        there = ", ".join(dict.fromkeys(metrics))
        yield f"grpo.validation.metric is {grpo.validation.metric}; it must be one of {there}"


def _vllm_problems(recipe) -> Iterator[str]:
    generation, vllm = recipe.grpo.generation, recipe.grpo.generation.vllm
    if generation.backend != Backend.vllm:
        if vllm != VllmConfig():
            yield "grpo.generation.vllm is set, but grpo.generation.backend is mcore; set backend=vllm, or leave it out"
        return
    if not (vllm.url or "").startswith(("http://", "https://")):
        yield f"grpo.generation.vllm.url is {vllm.url}; set it to the server's, such as http://localhost:8000"
    if not vllm.folder:
        yield "grpo.generation.vllm.folder is null; set it to the 'export vllm' folder that the server was started on"
    if not 0 < vllm.timeout < math.inf:
        yield f"grpo.generation.vllm.timeout is {vllm.timeout}; it must be greater than 0 seconds"
    if generation.temperature != 1:
        yield (
            f"grpo.generation.temperature is {generation.temperature}; with backend vllm it must be 1, the temperature "
            "of the log-probabilities that vLLM tells"
        )
    if recipe.train.lora.rank:
        yield "train.lora.rank is set; backend vllm gets whole weights, set it to 0 or take backend mcore"


def _scales_tasks(advantage: AdvantageConfig) -> bool:
    """Whether rewards of tasks with other ranges push alike."""
    if advantage.estimator == Estimator.gdpo:
        return True  # components are from 0 to 1
    own = (Normalize.group, Normalize.task)
    if advantage.estimator == Estimator.grpo:
        return advantage.normalize in (None, *own)
    return advantage.estimator in (Estimator.dr_grpo, Estimator.rloo) and advantage.normalize in own
