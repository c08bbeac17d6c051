"""What a recipe may say: every key, its type, its default and its unit."""

from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from typing import Dict, List, Optional

from omegaconf import MISSING

from nemo_bluelm.config.grpo import GrpoConfig, Objective
from nemo_bluelm.config.optim import OptimConfig
from nemo_bluelm.config.rewards import EnvironmentConfig
from nemo_bluelm.geometry import Geometry

# OmegaConf can't merge into a frozen dataclass, so the schema has an open twin of Geometry with the same fields.
GeometryConfig = make_dataclass("GeometryConfig", [(f.name, f.type, f.default) for f in fields(Geometry)])
GeometryConfig.__module__ = __name__  # so that a recipe can be pickled


class Dtype(str, Enum):
    """Element type of parameters and activations; gradients and optimizer states stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fp8Recipe(str, Enum):
    """How Transformer Engine scales FP8 tensors."""

    delayed = "delayed"  # per tensor, from the amax of the last steps: fastest, lags while activations grow
    current = "current"  # per tensor, from the tensor itself
    blockwise = "blockwise"  # per block of 128 x 128 (weights) or 1 x 128, as DeepSeek-V3 (arXiv 2412.19437)


class Recompute(str, Enum):
    """What the backward pass computes again instead of keeping it."""

    none = "none"
    mlp = "mlp"  # each layer's MLP: about half of a layer's activations for a third of its MLP's forward and backward
    full = "full"  # whole layers: only their inputs are kept


class ContextComm(str, Enum):
    """How attention sees the other context-parallel ranks' tokens."""

    all_gather = "all_gather"  # keys and values of all ranks on each
    p2p = "p2p"  # keys and values go round a ring while attention works; Transformer Engine's, needs a GPU
    a2a = "a2a"  # each rank gets all tokens of some heads (Ulysses, arXiv 2309.14509)


class Part(str, Enum):
    """The three modules of the model, each with its own weights."""

    vision = "vision"
    projector = "projector"
    language = "language"


class Activation(str, Enum):
    """Between the projector's two linear layers."""

    gelu = "gelu"  # of the error function, as in VILA
    swiglu = "swiglu"  # x * silu(gate), the first layer giving both, as in Cohere2Vision


class LoraModule(str, Enum):
    """Linear layers of a decoder layer, by Megatron-Core's names."""

    linear_qkv = "linear_qkv"
    linear_proj = "linear_proj"
    linear_fc1 = "linear_fc1"
    linear_fc2 = "linear_fc2"


class Oversize(str, Enum):
    """What happens to a sample larger than a pack; plain text is always split instead."""

    drop = "drop"
    truncate = "truncate"  # text after the last token that fits; images are never split
    error = "error"


class DecodeBackend(str, Enum):
    """Who turns image bytes into tiles; they agree to 16 levels of 255 at most, 0.25 on average."""

    torch = "torch"  # Pillow decodes, ATen resizes
    dali = "dali"  # NVIDIA DALI
    pil = "pil"  # Pillow alone: the reference


class DecodeDevice(str, Enum):
    """Where DALI works; the other backends are for the CPU."""

    cpu = "cpu"
    gpu = "gpu"


@dataclass
class VisionConfig:
    """SigLIP2 vision transformer without pooling head. Defaults: timm ``vit_so400m_patch14_siglip_378.v2_webli``."""

    tower: str = "siglip2"  # registered vision tower
    num_layers: int = 27
    hidden_size: int = 1152
    ffn_hidden_size: int = 4304
    num_attention_heads: int = 16
    layernorm_epsilon: float = 1e-6


@dataclass
class YarnConfig:
    """YaRN scaling of RoPE (arXiv 2309.00071). ``factor`` 1 is plain RoPE."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # attention scaling is 0.1 * mscale * ln(factor) + 1
    mscale_all_dim: float = 0.0


@dataclass
class LanguageConfig:
    """Dense decoder-only transformer: RMSNorm, SwiGLU, grouped-query attention, RoPE, no biases."""

    num_layers: int = 32
    hidden_size: int = 2560
    ffn_hidden_size: int = 6912
    num_attention_heads: int = 20
    num_query_groups: int = 4
    kv_channels: int = 128
    vocab_size: int = 100_096
    layernorm_epsilon: float = 1e-6
    qk_layernorm: bool = False  # RMSNorm of every head's queries and keys, before RoPE, as Qwen3 has
    rotary_base: int = 10_000
    share_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    yarn: YarnConfig = field(default_factory=YarnConfig)


@dataclass
class ProjectorConfig:
    """Token fold and MLP between ViT and language model. Defaults: VILA's ``mlp_downsample``."""

    layer_norm: bool = True  # of folded tokens, before the first linear layer
    activation: Activation = Activation.gelu


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)


def geometry_of(model: ModelConfig) -> Geometry:
    """The model's AnyRes geometry.

    Raises:
        UserError: sizes that cannot tile.
    """
    return Geometry(**vars(model.geometry))


def projector_width(model: ModelConfig) -> int:
    """Channels that the projector's first linear layer makes."""
    return model.language.hidden_size * (2 if model.projector.activation is Activation.swiglu else 1)


@dataclass
class SourceConfig:
    """One part of the data mixture."""

    shards: List[str] = MISSING  # WebDataset tars or JSONL files; globs, relative to data.root
    weight: float = 1.0  # share of the mixture, by tokens; shares are divided by their sum
    max_epochs: Optional[float] = None  # leave the mixture after going through the samples this often
    reader: Optional[str] = None  # registered data source that reads them; null: they are WebDataset tars or JSONL
    resample: Dict[str, float] = field(default_factory=dict)  # tag -> how often its samples come in an epoch


@dataclass
class DecodeConfig:
    """How images are read; none of it changes which samples a run sees."""

    backend: DecodeBackend = DecodeBackend.torch
    device: DecodeDevice = DecodeDevice.cpu
    threads: int = 2  # of each process; 0 reads in the training thread
    prefetch: int = 4  # packs loaded ahead by each process


class ControlToken(str, Enum):
    """Where the token stands that asks for a thought."""

    after_query = "after_query"  # the BlueLM-2.5 report's
    before_query = "before_query"  # for comparison: instructions at the start of a query interfere with it


@dataclass
class ChatConfig:
    """The chat format; a checkpoint's own is used to generate from it."""

    control_token: ControlToken = ControlToken.after_query


@dataclass
class DataConfig:
    root: str = MISSING  # folder or URL that holds the tokenizer and the shards
    tokenizer: str = "tokenizer.json"  # relative to data.root
    index: str = "outputs/index"  # folder for what is known of each shard; may be shared by runs and corpora
    sequence_length: int = 4096  # tokens in a pack
    max_tiles: int = 64  # tiles in a pack
    max_documents: int = 128  # documents in a pack
    oversize: Oversize = Oversize.drop
    max_bad_fraction: float = 0.1  # of the samples a process read; with more that can't be decoded the run stops
    chat: ChatConfig = field(default_factory=ChatConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    sources: Dict[str, SourceConfig] = MISSING


@dataclass
class ParallelConfig:
    """How the model is laid over ranks. Data parallelism is what remains: world / (tensor * pipeline * context)."""

    tensor: int = 1
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    pipeline: int = 1
    virtual_pipeline: Optional[int] = None  # model chunks per pipeline rank
    first_stage_layers: Optional[int] = None  # decoder layers beside the ViT on the first pipeline rank
    context: int = 1
    context_comm: ContextComm = ContextComm.all_gather
    share_tiles: bool = True  # tensor- and context-parallel ranks split the ViT's tiles instead of all doing all
    overlap: bool = True  # reduce gradients (and gather sharded parameters) while the model works
    distributed_optimizer: bool = False  # shard optimizer states over data-parallel ranks


@dataclass
class Fp8Config:
    """FP8 matrix products by Transformer Engine; embeddings, output layer, norms and attention stay in ``dtype``."""

    recipe: Optional[Fp8Recipe] = None  # null: no FP8
    parts: List[Part] = field(default_factory=lambda: [Part.language])
    bf16_first_layers: int = 0  # of the language model, left in BF16
    bf16_last_layers: int = 0


@dataclass
class PrecisionConfig:
    dtype: Dtype = Dtype.bf16
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass
class RecomputeConfig:
    """Memory for time, chosen for each transformer."""

    vision: Recompute = Recompute.none
    language: Recompute = Recompute.none
    language_layers: Optional[int] = None  # layers of a pipeline rank that do so; null: all


@dataclass
class LoraConfig:
    """Train low-rank adapters (arXiv 2106.09685) in the language model instead of its weights."""

    rank: int = 0  # 0: no adapters
    alpha: float = 32.0  # an adapter's output counts alpha / rank
    dropout: float = 0.0  # of an adapter's input
    modules: List[LoraModule] = field(default_factory=lambda: list(LoraModule))


@dataclass
class TrainConfig:
    steps: int = MISSING  # optimizer steps
    global_batch_size: int = 1  # packs in an optimizer step, over all ranks
    micro_batch_size: int = 1  # packs that go through the model together, laid end to end
    cuda_graphs: bool = False  # replay each decoder layer as a CUDA graph; needs a GPU
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    freeze: List[Part] = field(default_factory=list)
    min_text_share: Optional[float] = None  # of a text and image mixture's tokens, or it is refused; null: 0.35 warns
    lora: LoraConfig = field(default_factory=LoraConfig)
    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # newest checkpoints kept; -1 keeps all
    keep_every: int = 0  # those of every so many steps are kept for good, too; 0: none
    skip_bad_steps: int = 0  # in a row, whose update is left out as loss or gradient is NaN, infinite or a spike
    spike_factor: float = 0.0  # a loss or gradient norm above this many times the median of 100 is a spike; 0: none is
    hang_timeout: float = 3600.0  # seconds without the end of a step after which a rank is ended; 0: never
    straggler_report: float = 0.0  # seconds between looks for slow GPUs, by nvidia-resiliency-ext; 0: none
    log_every: int = 10  # steps between progress lines on a non-terminal


@dataclass
class DistillConfig:
    """Learning from a larger model beside the data: the loss is (1 - w) * CE + w * T^2 * KL(teacher || student), both
    distributions at temperature T. T^2 keeps the gradient's size (Hinton et al., arXiv 1503.02531, section 2). Weight,
    temperature and top_k go linearly from their value at the first step to the one at the last."""

    teacher: Optional[str] = None  # run or checkpoint folder of a model that runs beside the student
    split_teacher: bool = True  # over the tensor-parallel ranks, as the student is; false: whole on each of them
    logits: Optional[str] = None  # folder that tools/make_teacher_logits.py wrote; instead of a teacher
    weight: float = 1.0  # w
    weight_end: Optional[float] = None  # null: weight
    temperature: float = 1.0  # T
    temperature_end: Optional[float] = None  # null: temperature
    top_k: Optional[int] = None  # the teacher's likeliest tokens that count one by one, the rest as one; null: all
    top_k_end: Optional[int] = None  # null: top_k


class WandbMode(str, Enum):
    """Where Weights & Biases keeps a run."""

    disabled = "disabled"
    offline = "offline"  # in the run's folder; wandb sync sends it
    online = "online"


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.disabled
    project: str = "nemo_bluelm"


@dataclass
class LogConfig:
    """Loggers beside ``metrics.jsonl``; nothing leaves the machine unless a mode says so."""

    tensorboard: bool = False  # in the run's folder: tensorboard --logdir RUN_DIR
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class Recipe:
    """One training run."""

    name: str = MISSING
    run_dir: str = "outputs/runs/${name}"  # checkpoints, metrics and the resolved recipe; the same folder resumes
    init_from: Optional[str] = None  # run or checkpoint folder whose weights start this run
    init_vision_from: Optional[str] = None  # the same for the ViT, where it isn't init_from's
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    objective: Objective = Objective.next_token
    stage: Optional[str] = None  # registered stage that trains it; null: the objective's own
    grpo: GrpoConfig = field(default_factory=GrpoConfig)  # of objective grpo, as are the environments
    environments: Dict[str, EnvironmentConfig] = field(default_factory=dict)  # by the task_name of records
