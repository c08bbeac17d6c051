"""What other reinforcement-learning tools call our keys: NeMo-Aligner, NeMo-RL, verl, TRL."""

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
}


def renamed(override: str) -> str:
    """An override with our name of its key."""
    sign = override[: len(override) - len(override.lstrip("+~"))]
    key, equals, value = override[len(sign) :].partition("=")
    return f"{sign}{ALIASES.get(key, key)}{equals}{value}"
