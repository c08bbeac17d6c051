"""What other reinforcement-learning tools call our keys: NeMo-Aligner, NeMo-RL, verl, TRL."""

from collections.abc import Sequence

from nemo_bluelm.errors import UserError

ALIASES = {
    "grpo.num_prompts_per_grpo_step": "grpo.num_prompts_per_step",  # NeMo-Aligner
    "grpo.samples_per_prompt": "grpo.num_generations_per_prompt",  # NeMo-Aligner
    "grpo.num_generations": "grpo.num_generations_per_prompt",  # TRL
    "grpo.ppo_epochs": "grpo.num_iterations",  # verl
    "grpo.use_dynamic_sampling": "grpo.dynamic_sampling.enabled",  # NeMo-RL
    "grpo.dynamic_sampling_max_gen_batches": "grpo.dynamic_sampling.max_gen_batches",  # NeMo-RL
    "grpo.overlong_filtering": "grpo.overlong.filtering",  # NeMo-RL
    "grpo.use_leave_one_out_baseline": "grpo.advantage.leave_one_out",  # NeMo-Aligner, NeMo-RL
    "grpo.initial_policy_kl_penalty": "grpo.loss.reference_policy_kl_penalty",  # NeMo-Aligner
    "grpo.val_check_interval": "grpo.validation.period",  # NeMo-Aligner
    "grpo.val_period": "grpo.validation.period",  # NeMo-RL
    "grpo.run_validation_step_0": "grpo.validation.at_start",  # NeMo-Aligner
    "grpo.val_at_start": "grpo.validation.at_start",  # NeMo-RL
    "grpo.greedy_on_validation": "grpo.validation.greedy",  # NeMo-Aligner
    "grpo.ratio_eps_low": "grpo.loss.ratio_clip_min",  # NeMo-Aligner
    "grpo.ratio_eps_high": "grpo.loss.ratio_clip_max",  # NeMo-Aligner
    "loss_fn.reference_policy_kl_penalty": "grpo.loss.reference_policy_kl_penalty",  # NeMo-RL
    "loss_fn.reference_policy_kl_type": "grpo.loss.reference_policy_kl_type",  # NeMo-RL
    "loss_fn.ratio_clip_min": "grpo.loss.ratio_clip_min",  # NeMo-RL
    "loss_fn.ratio_clip_max": "grpo.loss.ratio_clip_max",  # NeMo-RL
    "loss_fn.ratio_clip_c": "grpo.loss.ratio_clip_c",  # NeMo-RL
    "policy.train_global_batch_size": "train.global_batch_size",  # NeMo-RL
    "policy.max_total_sequence_length": "data.sequence_length",  # NeMo-RL
    "policy.generation.temperature": "grpo.generation.temperature",  # NeMo-RL
    "policy.generation.top_p": "grpo.generation.top_p",  # NeMo-RL
    "policy.generation.top_k": "grpo.generation.top_k",  # NeMo-RL
    "policy.generation.max_new_tokens": "grpo.generation.max_new_tokens",  # NeMo-RL
    "grpo.max_val_samples": "grpo.validation.max_samples",  # NeMo-RL
}


def renamed(overrides: Sequence[str]) -> list[str]:
    """Overrides with our names of their keys.

    Raises:
        UserError: two that name one key by two names.
    """
    given: dict[str, str] = {}
    found = []
    for override in overrides:
        sign = override[: len(override) - len(override.lstrip("+~"))]
        key, equals, value = override[len(sign) :].partition("=")
        ours = ALIASES.get(key, key)
        if given.setdefault(ours, key) != key:
            raise UserError(f"{given[ours]} and {key} are names of one key; give one of them")
        found.append(f"{sign}{ours}{equals}{value}")
    return found
