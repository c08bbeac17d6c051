"""What TRL 1.16.0 and verl 0.9.1 compute on small random batches: losses, gradients, advantages, corrections.

    python tests/oracles/rl_oracle.py

writes rl_golden.json anew. That needs both packages: ``pip install --no-deps trl==1.16.0 verl==0.9.1
tensordict==0.10.0 codetiming pyvers orjson ray msgpack jsonschema 'datasets<5'`` in an environment with this project.
TRL's computations are private methods, called on a stand-in for the trainer; verl's are functions. No number here
comes from this project. A case has the inputs, the options in this project's words, and what the oracle answers.
"""

import collections
import importlib.metadata
import json
import types
from pathlib import Path

import numpy as np
import torch
from trl import GRPOTrainer
from trl.rewards import get_soft_overlong_punishment
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig

GOLDEN = Path(__file__).with_name("rl_golden.json")
B, T = 6, 7
VERL_MODES = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
}
TRL_LOSSES = {"token_mean": "dapo", "seq_mean_token_mean": "grpo", "seq_mean_token_sum_norm": "dr_grpo"}


def record(seed: int) -> dict:
    """Batches and cases of one seed, as JSON would hold them."""
    generator = torch.Generator().manual_seed(seed)
    batch = _batch(generator)
    cases = [
        *_trl_losses(batch),
        *_verl_losses(batch),
        *_kl(batch),
        *_corrections(batch),
        *_advantages(generator),
        *_shaping(batch),
    ]
    return {"batch": {name: _plain(value) for name, value in batch.items()}, "cases": cases}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("trl", "verl", "torch", "transformers")}


def _batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Log-ratios wide enough that every clip acts, a masked token amid a response, and a response with none left."""

    def noise(scale: float) -> torch.Tensor:
        # Values that fp32 holds exactly: TRL passes rollout log-probabilities through fp32.
        return (scale * torch.randn(B, T, generator=generator)).float().double()

    logp = -3 * torch.rand(B, T, generator=generator).double()
    lengths = torch.tensor([7, 5, 3, 0, 6, 2])
    mask = (torch.arange(T) < lengths[:, None]).double()
    mask[0, 3] = 0
    rollout = (logp + noise(0.4) + noise(0.3)).float().double()
    advantages = torch.randn(B, generator=generator).double()
    return {
        "logp": logp,
        "old_logp": logp + noise(0.5),
        "ref_logp": logp + noise(0.3),
        "rollout_logp": rollout,
        "mask": mask,
        "advantages": advantages,
        "weights": torch.rand(B, T, generator=generator).double() * 2,
        "entropy": torch.rand(B, T, generator=generator).double(),
    }


# ---- losses


class _Accelerator:
    num_processes = 1
    process_index = 0
    device = torch.device("cpu")
    sync_gradients = True

    def gather(self, values):
        return values

    def reduce(self, values, reduction="sum"):
        return values


def _trl_trainer(**settings) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        **{
            "accelerator": _Accelerator(),
            "model": types.SimpleNamespace(training=True),
            "_metrics": {"train": collections.defaultdict(list)},
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "aux_loss_enabled": False,
            "_entropy_bonus_enabled": False,
            "vllm_importance_sampling_correction": True,
            "current_gradient_accumulation_steps": 1,
            **settings,
        }
    )


def _trl_loss(batch, loss_type, *, clip_min=0.2, clip_max=0.2, level="token", delta=None, beta=0.0, weights=False):
    logp = batch["logp"].clone().requires_grad_()
    trainer = _trl_trainer(
        importance_sampling_level=level,
        beta=beta,
        args=types.SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        epsilon_low=clip_min,
        epsilon_high=clip_max,
        loss_type=loss_type,
        use_vllm=weights,
        max_completion_length=T,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, batch["entropy"], None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logp"],
        "ref_per_token_logps": batch["ref_logp"],
        "importance_sampling_ratio": batch["weights"],
        "num_items_in_batch": batch["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss, gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _trl_losses(batch):
    variants = {
        "plain": ({}, {}),
        "clip-higher": ({"clip_max": 0.28}, {"clip_max": 0.28}),
        "kl": ({"beta": 0.1}, {"kl_coefficient": 0.1}),
        "gspo": ({"level": "sequence"}, {"policy_loss": "gspo"}),
        "delta": ({"delta": 1.5}, {"clip_c": 1.5}),
        "weights": ({"weights": True}, {"weights": True}),
    }
    for aggregation, loss_type in TRL_LOSSES.items():
        for name, (settings, options) in variants.items():
            loss, gradient, metrics = _trl_loss(batch, loss_type, **settings)
            expected = {"loss": _plain(loss), "gradient": _plain(gradient)}
            if name in ("plain", "clip-higher", "kl"):  # at sequence level TRL counts sequences, here tokens count
                expected |= {
                    "policy/clip_frac_low": metrics["clip_ratio/low_mean"],
                    "policy/clip_frac_high": metrics["clip_ratio/high_mean"],
                    "policy/entropy": metrics["entropy"],
                }
            if name == "kl":
                expected["kl/ref"] = metrics["kl"]
            # TRL counts sequences without a token too.
            normalizer = None if aggregation == "token_mean" else B
            yield _case(
                "loss", f"trl {loss_type} {name}", {"aggregation": aggregation, **options}, expected, normalizer
            )
    # TRL's bound is of the ratio itself, and it has no lower one.
    loss, gradient, _ = _trl_loss(batch, "cispo", clip_max=1.28)
    options = {"policy_loss": "cispo", "clip_min": 1.0, "clip_max": 0.28}
    yield _case("loss", "trl cispo", options, {"loss": _plain(loss), "gradient": _plain(gradient)})


def _verl_losses(batch):
    variants = {
        "vanilla": ("vanilla", {"clip_ratio_c": 1e9}, {"clip_max": 0.28}),
        "dual clip": ("vanilla", {"clip_ratio_c": 1.5}, {"clip_max": 0.28, "clip_c": 1.5}),
        "gspo": ("gspo", {}, {"clip_max": 0.28, "policy_loss": "gspo"}),
        "cispo": ("cispo", {}, {"clip_max": 0.28, "policy_loss": "cispo"}),
        "reinforce": (None, {}, {"policy_loss": "reinforce"}),
    }
    for aggregation, mode in VERL_MODES.items():
        for name, (function, settings, options) in variants.items():
            for weights in (False, True) if aggregation == "token_mean" else (False,):
                config = ActorConfig(
                    strategy="fsdp",
                    rollout_n=1,
                    ppo_micro_batch_size_per_gpu=1,
                    clip_ratio=0.2,
                    clip_ratio_low=0.2,
                    clip_ratio_high=0.28,
                    **settings,
                )
                loss_of = (
                    core_algos.get_policy_loss_fn(function) if function else core_algos.compute_policy_loss_reinforce
                )
                logp = batch["logp"].clone().requires_grad_()
                loss, metrics = loss_of(
                    batch["old_logp"],
                    logp,
                    batch["advantages"][:, None].expand(B, T),
                    batch["mask"],
                    mode,
                    config,
                    batch["weights"] if weights else None,
                )
                (gradient,) = torch.autograd.grad(loss, logp)
                expected = {"loss": _plain(loss), "gradient": _plain(gradient)}
                expected["policy/approx_kl"] = metrics["actor/ppo_kl"]
                if function:
                    expected["clip_frac"] = metrics["actor/pg_clipfrac"]
                    expected["policy/clip_frac_dual"] = metrics["actor/pg_clipfrac_lower"]
                options = {"aggregation": aggregation, **options} | ({"weights": True} if weights else {})
                yield _case("loss", f"verl {name} {mode}{' weights' * weights}", options, expected)
    # A rank's loss where gradients are averaged over two ranks.
    values = batch["weights"]
    for aggregation, mode in VERL_MODES.items():
        for rank, rows in enumerate((slice(0, 2), slice(2, B))):
            loss = core_algos.agg_loss(
                values[rows],
                batch["mask"][rows],
                mode,
                dp_size=2,
                batch_num_tokens=batch["mask"].sum(),
                global_batch_size=(batch["mask"].sum(1) > 0).sum(),
            )
            options = {"aggregation": aggregation, "rows": [rows.start, rows.stop]}
            yield _case("rank", f"verl {mode} rank {rank}", options, {"loss": _plain(loss)})


def _kl(batch):
    for kl_type in ("k1", "k2", "k3"):
        logp = batch["logp"].clone().requires_grad_()
        penalty = core_algos.kl_penalty(logp, batch["ref_logp"], kl_type)
        (gradient,) = torch.autograd.grad(penalty.sum(), logp)
        expected = {"penalty": _plain(penalty), "gradient": _plain(gradient)}
        yield _case("kl", f"verl {kl_type}", {"kl_type": kl_type}, expected)


# ---- rollout correction


def _corrections(batch):
    log_ratio, mask = batch["old_logp"] - batch["rollout_logp"], batch["mask"]

    def verl(threshold, rejection=None):
        weights, kept, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
            old_log_prob=batch["old_logp"],
            rollout_log_prob=batch["rollout_logp"],
            response_mask=mask,
            rollout_is="token",
            rollout_is_threshold=threshold,
            rollout_rs="seq_mean_k1" if rejection else None,
            rollout_rs_threshold=rejection,
        )
        return weights.batch["rollout_is_weights"] * kept, metrics

    weights, _ = verl(1.5)
    yield _case("correction", "verl tis", {"correction": "tis", "upper": 1.5}, {"weights": _plain(weights)})
    weights, metrics = verl("0.7_1.4")
    expected = {"weights": _plain(weights)}
    share = metrics.get("rollout_corr/rollout_is_oob_ratio")
    if share is not None:
        expected["mismatch/is_oob_ratio"] = share
    yield _case("correction", "verl icepop", {"correction": "icepop", "lower": 0.7, "upper": 1.4}, expected)
    # verl's k1 is of rollout over training, so the bounds are the inverse ones; its weights are cut off far away.
    mean = (log_ratio * mask).sum(1)[mask.any(1)] / mask.sum(1)[mask.any(1)]
    ends = mean.exp().sort().values
    lower, upper = ((ends[i] + ends[i + 1]).item() / 2 for i in (0, len(ends) - 2))
    weights, _ = verl(1e6, f"{1 / upper}_{1 / lower}")
    options = {"correction": "seq_mask_tis", "lower": lower, "upper": upper}
    yield _case("correction", "verl seq_mean_k1", options, {"weights": _plain(weights)})
    for mode, correction, lower in (("token_truncate", "tis", None), ("token_mask", "icepop", 0.7)):
        trainer, inputs = _trl_generation(torch.zeros(B, 1), B, scale="group", batch=batch)
        trainer.use_vllm = True
        trainer.vllm_importance_sampling_mode = mode
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = lower, 1.4
        output = GRPOTrainer._generate_and_score_completions(trainer, inputs)
        weights = output["importance_sampling_ratio"] * mask  # TRL leaves 1 on masked tokens
        options = {"correction": correction, "lower": lower or 0.0, "upper": 1.4}
        yield _case("correction", f"trl {mode}", options, {"weights": _plain(weights)})


# ---- advantages


def _trl_generation(rewards, group_size, *, scale, weights=None, how="sum_then_normalize", batch=None):
    """TRL's trainer at the point where it scores completions, all else left out."""
    n = len(rewards)
    tokens = [[1] * T] * n
    mask = [[1] * T] * n if batch is None else batch["mask"].long().tolist()
    logps = None if batch is None else batch["rollout_logp"].tolist()
    trainer = _trl_trainer(
        args=types.SimpleNamespace(
            per_device_train_batch_size=n,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        num_iterations=1,
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        use_vllm=False,
        beta=0.0,
        num_generations=group_size,
        multi_objective_aggregation=how,
        scale_rewards=scale,
        reward_weights=torch.ones(rewards.size(1)).double() if weights is None else torch.tensor(weights).double(),
        reward_funcs=[None] * rewards.size(1),
        reward_func_names=[str(i) for i in range(rewards.size(1))],
        _logs=collections.defaultdict(list) | {"rewards": collections.defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
        _generate=lambda prompts: ([[1]] * n, tokens, mask, [""] * n, logps, {}, None, None),
        _calculate_rewards=lambda *_: rewards.clone(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["old_logp"], None, None),
    )
    trainer.model.is_gradient_checkpointing = False
    return trainer, [{"prompt": "?"}] * n


def _advantages(generator):
    binary = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1]).double()
    real = torch.randn(12, generator=generator).double()
    for name, rewards in (("binary", binary), ("real", real)):
        n = len(rewards)
        groups = torch.arange(n) // 4
        order = torch.randperm(n, generator=generator)
        yield from _verl_advantages(name, rewards[order], groups[order], generator)
        yield from _trl_advantages(name, rewards, groups)
    unscorable = real.clone()
    unscorable[[1, 6, 7]] = torch.nan
    yield from _trl_advantages("unscorable", unscorable, torch.arange(12) // 4)

    components = torch.rand(8, 3, generator=generator).double().round(decimals=2)
    components[5] = torch.nan
    components[2, 1] = torch.nan
    weights = [1.0, 0.5, 2.0]
    trainer, inputs = _trl_generation(components, 4, scale="group", weights=weights, how="normalize_then_sum")
    advantages = GRPOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]
    options = {"estimator": "gdpo", "weights": weights, "std_eps": 1e-4}
    yield _advantage_case("trl normalize_then_sum", None, torch.arange(8) // 4, options, advantages, components)

    components = components.nan_to_num(nan=0.25)
    lengths, mask, _ = _verl_rows(torch.zeros(8), generator)
    result, _ = core_algos.compute_gdpo_outcome_advantage(
        torch.zeros(8, T),
        mask.float(),
        (np.arange(8) // 4).astype(object),
        epsilon=1e-12,
        config=AlgoConfig(gdpo_reward_keys=["0", "1", "2"], gdpo_reward_weights=weights),
        non_tensor_batch={str(i): components[:, i].numpy() for i in range(3)},
        batch={"prompts": torch.zeros(8, 1), "attention_mask": torch.cat((torch.ones(8, 1), mask), 1).long()},
    )
    options = {"estimator": "gdpo", "weights": weights, "std_eps": 1e-12, "lengths": lengths.tolist()}
    case = _advantage_case("verl gdpo", None, torch.arange(8) // 4, options, result[:, 0], components)
    yield case | {"tolerance": 5e-6}  # it computes in fp32


def _verl_rows(rewards, generator):
    """Responses of 1 to T tokens, and their reward on the last one."""
    lengths = torch.randint(1, T + 1, (len(rewards),), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).double()
    scores = torch.zeros(len(rewards), T, dtype=rewards.dtype)
    scores[torch.arange(len(rewards)), lengths - 1] = rewards
    return lengths, mask, scores


def _verl_advantages(name, rewards, groups, generator):
    lengths, mask, scores = _verl_rows(rewards, generator)
    index = groups.numpy().astype(object)
    weighed = {"lengths": lengths.tolist(), "std_eps": 1e-12}  # verl adds 1e-8 to the variance
    for which, options, compute in (
        ("grpo", {}, lambda: core_algos.compute_grpo_outcome_advantage(scores.clone(), mask, index)),
        ("grpo vectorized", {}, lambda: core_algos.compute_grpo_vectorized_outcome_advantage(scores, mask, index)),
        (
            "dr_grpo",
            {"estimator": "dr_grpo"},
            lambda: core_algos.compute_grpo_outcome_advantage(
                scores.clone(), mask, index, norm_adv_by_std_in_grpo=False
            ),
        ),
        ("rloo", {"estimator": "rloo"}, lambda: core_algos.compute_rloo_outcome_advantage(scores.clone(), mask, index)),
        (
            "rloo vectorized",
            {"estimator": "grpo", "leave_one_out": True, "normalize": "none"},
            lambda: core_algos.compute_rloo_vectorized_outcome_advantage(scores, mask, index),
        ),
        (
            "reinforce_plus_plus",
            {"estimator": "reinforce_pp", **weighed},
            lambda: core_algos.compute_reinforce_plus_plus_outcome_advantage(scores, mask, AlgoConfig(gamma=1.0)),
        ),
        (
            "reinforce_plus_plus_baseline",
            {"estimator": "reinforce_pp_baseline", **weighed},
            lambda: core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(scores.clone(), mask, index),
        ),
    ):
        case = _advantage_case(f"verl {which} {name}", rewards, groups, options, compute()[0][:, 0])
        yield case | ({"tolerance": 5e-6} if which == "grpo vectorized" else {})  # it computes in fp32


def _trl_advantages(name, rewards, groups):
    for scale in ("group", "batch", "none"):
        trainer, inputs = _trl_generation(rewards[:, None], 4, scale=scale)
        advantages = GRPOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]
        options = {"normalize": scale, "std_eps": 1e-4}
        yield _advantage_case(f"trl {scale} {name}", rewards, groups, options, advantages)


def _advantage_case(name, rewards, groups, options, advantages, components=None):
    inputs = {"group_ids": groups.tolist()}
    if rewards is not None:
        inputs["rewards"] = _plain(rewards)
    if components is not None:
        inputs["components"] = _plain(components)
    return _case("advantage", name, options, {"advantages": _plain(advantages)}) | {"inputs": inputs}


# ---- shaping


def _shaping(batch):
    lengths = [0, 1, 79, 80, 81, 90, 99, 100, 101, 5000]
    for buffer in (20, 100, 0):
        punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=buffer)
        values = punish(completion_ids=[[1] * length for length in lengths])
        options = {"lengths": lengths, "max_length": 100, "buffer_length": buffer}
        yield _case("overlong", f"trl buffer {buffer}", options, {"punishment": values})
    scores = torch.zeros(B, T).double()
    scores[:, 0] = batch["advantages"]
    masked = core_algos.compute_rewards(scores, batch["logp"] * batch["mask"], batch["ref_logp"] * batch["mask"], 0.05)
    yield _case("reward kl", "verl compute_rewards", {"coefficient": 0.05}, {"rewards": _plain(masked.sum(1))})


def _case(kind, name, options, expected, normalizer=None):
    return {"kind": kind, "name": name, "options": options, "expected": expected, "normalizer": normalizer}


def _plain(value: torch.Tensor):
    """Numbers as JSON has them; null for NaN."""
    value = value.detach()
    if value.ndim:
        return [_plain(item) for item in value]
    return None if value.isnan() else value.item()


if __name__ == "__main__":
    content = {"versions": versions(), "seed": 0, **record(0)}
    GOLDEN.write_text(json.dumps(content, separators=(",", ":")).replace('{"kind"', '\n{"kind"') + "\n")
