"""What a recipe may say about its optimizer: every key, its type, its default and its unit."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING


class Schedule(str, Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # stable, then down to min_lr in the last decay_steps (MiniCPM, arXiv 2404.06395)
    two_stage = "two_stage"  # lr, then second_lr, as BlueLM-7B's technical report has it


class DecayShape(str, Enum):
    """How ``wsd`` goes down, at the share p of its decay: the share of lr - min_lr that is left."""

    sqrt = "sqrt"  # 1 - sqrt(p): the best of those compared in arXiv 2405.18392
    linear = "linear"  # 1 - p
    cosine = "cosine"  # (1 + cos(pi * p)) / 2


@dataclass
class PartOptimConfig:
    """What one part of the model has of its own; null: the optimizer's."""

    lr: Optional[float] = None  # peak; the whole schedule, min_lr included, is scaled by it
    weight_decay: Optional[float] = None


@dataclass
class PartsOptimConfig:
    vision: PartOptimConfig = field(default_factory=PartOptimConfig)
    projector: PartOptimConfig = field(default_factory=PartOptimConfig)
    language: PartOptimConfig = field(default_factory=PartOptimConfig)


@dataclass
class OptimConfig:
    """AdamW with warm-up. Biases, norms and other vectors have no weight decay."""

    lr: float = MISSING
    min_lr: float = 0.0
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 0
    warmup_tokens: Optional[int] = None  # instead of warmup_steps; a step has global_batch_size * sequence_length
    decay_steps: Optional[int] = None  # of wsd: the last steps of the run
    decay_shape: DecayShape = DecayShape.sqrt  # of wsd
    second_lr: Optional[float] = None  # of two_stage
    second_stage_from: Optional[float] = None  # of two_stage: share of the steps before second_lr
    parts: PartsOptimConfig = field(default_factory=PartsOptimConfig)
    vision_layer_decay: float = 1.0  # a ViT layer's learning rate over that of the layer above it
    weight_decay: float = 0.05  # BlueLM-V-3B (arXiv 2411.10640), Tables 7 and 8
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_grad: float = 1.0  # maximal gradient norm; 0 is off
