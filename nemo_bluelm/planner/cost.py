"""Seconds of a training step by cause, from FLOPs, bytes sent and rates of the device."""

import math
from dataclasses import asdict, dataclass

from nemo_bluelm.config.schema import ContextComm, Dtype, Fp8Recipe, Part, Recipe, Recompute, geometry_of
from nemo_bluelm.model.flops import Flops, layer_weights, pack_flops
from nemo_bluelm.planner.devices import GPUS_PER_NODE, Device
from nemo_bluelm.planner.memory import fp8_layers, micro_batches, notable_stages, stage_layers, stage_trained
from nemo_bluelm.planner.teacher import distills, teacher_beside

# Measured on one H200 with torch 2.11+cu130, Transformer Engine 2.9.0 and megatron-core 0.15.3, single runs: steps of
# 65,536 tokens of text, language model trained and ViT frozen; the rows are in tests/planner/planner_measured.py. Other
# kinds of GPU are taken to reach the same shares of their printed rates.
#
# A BF16 step of documents of 4,096 tokens took 1,979 ms under CUDA graphs; its kernels, profiled on another machine of
# the kind, take 2,016: matrix products 1,404, attention 372, optimizer 42, all else 198.
#
# Attention reaches ATTENTION of the dense BF16 peak with long documents, half of it with documents of HALF_LENGTH
# tokens: fitted to steps of 4,096, 8,192 and 32,768.
ATTENTION, HALF_LENGTH = 0.476, 1330
OUTPUT = 0.74  # the output layer's products, always in BF16
# Linear layers. With FP8, casts are in it. Delayed without graphs took 953 ms where current took 991; blockwise is 9%
# behind current, as Megatron-Core's own modules were on an H100.
LINEAR = {None: 0.70, Fp8Recipe.delayed: 1.14, Fp8Recipe.current: 1.07, Fp8Recipe.blockwise: 0.97}
HBM = 0.68  # of its printed rate: Adam
# Read and written of each parameter: gradient, master, two moments and BF16 weight by Adam (30); the gradient zeroed,
# divided by the targets, summed up and clipped; the weight copied.
OPTIMIZER_BYTES = 56
# Read and written of each logit by the divergence from a teacher and its gradient: 162 of all tokens, 197 of the 64
# likeliest, counted on layers/divergence.py; its time was not measured.
DIVERGENCE_BYTES = 170
# Norms, activations, RoPE, residuals, cross entropy: bytes moved for each FLOP of the linear layers, times the hidden
# size. Products grow with its square, the rest with the size itself.
ELEMENTWISE = 1.7
# ViT and projector, all they do: 64 tiles in 291 ms, 128 in 512 with FP8.
VISION = {False: 0.45, True: 0.51}
# Seconds that the GPU waits for the host in a layer's forward and backward, which CUDA graphs do away with: 64 and 128
# of them in a step of 32,768 tokens, of micro-batches of 16,384 and 8,192. BF16 took 1,131 ms at 8,192, 1,118 with
# graphs; FP8 current took 991 ms at 16,384, and 908 at 8,192 with graphs. That all FP8 recipes wait alike is assumed.
# (Then the loader still held Python's lock while it tokenised, so it is the most that they wait.)
GAPS = {None: 0.1e-3, Fp8Recipe.delayed: 1.3e-3, Fp8Recipe.current: 1.3e-3, Fp8Recipe.blockwise: 1.3e-3}
# Seconds that the host needs to launch them, which is what small micro-batches take: of 4,096 tokens, on an H100, with
# Megatron-Core's own modules, which launch more kernels; 128 took 819 ms in BF16.
HOST = {None: 5.7e-3, Fp8Recipe.delayed: 6.7e-3, Fp8Recipe.current: 7.4e-3, Fp8Recipe.blockwise: 7.8e-3}
# Assumed, not measured: what NCCL gets of a link, and what matrix products lose when tensor parallelism halves them.
LINK = 0.8
HALVED = 0.95
# Assumed too: kernels that run beside a collective lose this share of its time to it, as it takes multiprocessors and
# memory bandwidth from them.
SLOWED = 0.25
# Seconds for a collective to start (host and NCCL, assumed) and for each hop of its ring, inside a node and between
# nodes: what NCCL's own tuning takes for rings with the Simple protocol, hwLat in src/graph/tuning.cc.
START = 20e-6
HOP_INSIDE = 3.4e-6
HOP_BETWEEN = 14e-6
# Parameters of a gradient bucket with parallel.overlap, which is reduced and gathered on its own: at least so many, and
# so many for each rank that shares it (Megatron-Core's DistributedDataParallel).
BUCKET, BUCKET_OF_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Estimate:
    """A training step, in seconds unless it says otherwise. What is hidden behind other work isn't in it.

    Attributes:
        compute: of the pipeline stage that takes longest, all micro-batches.
        bubble: stages waiting for the first and the last micro-batch.
        tensor, context, pipeline, tiles: communication inside a model copy.
        teacher: forward pass of a frozen teacher, its communication in it.
        data: reduction of gradients and gathering of parameters, as far as it sticks out or slows what hides it.
        optimizer: Adam.
        sent: bytes that a GPU of the busiest stage sends in a step, by the kind of parallelism.
        flops: model FLOPs of the step.
        tokens: in the step.
        gpus: all of them.
        peak: of a GPU, FLOP/s.
    """

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    tiles: float
    teacher: float
    data: float
    optimizer: float
    sent: dict[str, float]
    flops: float
    tokens: int
    gpus: int
    peak: float

    @property
    def seconds(self) -> float:
        inside = (self.compute, self.bubble, self.tensor, self.context, self.pipeline, self.tiles, self.teacher)
        return sum(inside) + self.data + self.optimizer

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.gpus / self.peak

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds

    def gpu_hours(self, steps: int) -> float:
        return steps * self.seconds * self.gpus / 3600

    def to_dict(self) -> dict:
        rates = {"seconds": self.seconds, "mfu": self.mfu, "tokens_per_second": self.tokens_per_second}
        return {**asdict(self), **rates, "tflops": self.flops / self.seconds / self.gpus / 1e12}


def step_flops(recipe: Recipe, tiles: int) -> Flops:
    """Model FLOPs of a pack that is one document of full length with ``tiles`` tiles: the most that a pack can cost."""
    train = recipe.train
    return pack_flops(recipe.model, [recipe.data.sequence_length], tiles, train.freeze, train.lora)


def model_flops(recipe: Recipe, tiles: int) -> int:
    """Of such a pack, a frozen teacher's forward pass counted, as it is in ``metrics.jsonl``."""
    beside = teacher_beside(recipe)
    return step_flops(recipe, tiles).total + (step_flops(beside, tiles).total if beside else 0)


def estimate(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Estimate:
    """How long a step takes.

    Args:
        recipe: a valid recipe for ``world_size``.
        world_size: GPUs; tensor-parallel ranks are neighbours, then context-, data- and pipeline-parallel ones.
        tiles: image tiles in every pack.
    """
    parallel, train = recipe.parallel, recipe.train
    copies = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    count, beside = micro_batches(recipe, copies), teacher_beside(recipe)
    flops = step_flops(recipe, tiles)
    slowest, busiest = max((_compute(recipe, device, flops, stage), stage) for stage in notable_stages(recipe))
    sent = _sent_per_micro_batch(recipe, busiest, tiles)
    waits = _waits(recipe, world_size, device, flops, busiest, sent)
    one = slowest + sum(waits.values())
    trained = stage_trained(recipe, busiest)
    reduce, gather = _data_bytes(recipe, copies, trained)
    sent = {kind: count * value for kind, value in sent.items()} | {"data": reduce + gather}
    teacher = 0.0
    if beside is not None:
        teacher, sent_by_teacher = _teacher(beside, world_size, device, tiles)
        sent["teacher"] = count * sent_by_teacher
    return Estimate(
        compute=count * slowest,
        bubble=(parallel.pipeline - 1) / (parallel.virtual_pipeline or 1) * one,
        **{kind: count * waits.get(kind, 0.0) for kind in ("tensor", "context", "pipeline", "tiles")},
        teacher=count * teacher,
        data=_data(recipe, device, copies, trained, reduce, gather, one),
        optimizer=_optimizer(recipe, device, copies, trained),
        sent=sent,
        flops=model_flops(recipe, tiles) * train.global_batch_size,
        tokens=recipe.data.sequence_length * train.global_batch_size,
        gpus=world_size,
        peak=device.peak,
    )


def _waits(
    recipe: Recipe, world_size: int, device: Device, flops: Flops, stage: int, sent: dict[str, float]
) -> dict[str, float]:
    """Seconds that a rank of a stage waits for others of its model copy in a micro-batch, by parallelism."""
    parallel = recipe.parallel
    groups = {  # distance of neighbours, and ranks
        "tensor": (1, parallel.tensor),
        "context": (parallel.tensor, parallel.context),
        "pipeline": (world_size // parallel.pipeline, 2),  # it only sends to the next
        "tiles": (1, parallel.tensor * parallel.context),
    }
    calls = {"tensor": 8 * stage_layers(recipe)[stage], "context": 4 * stage_layers(recipe)[stage]}
    waits = {
        kind: sent[kind] / _rate(device, *group) + _latency(*group) * calls.get(kind, 2)
        for kind, group in groups.items()
        if sent[kind]
    }
    if parallel.context_comm == ContextComm.p2p and "context" in waits:  # goes round while attention works
        waits["context"] = max(0.0, waits["context"] - _attention(recipe, device, flops, stage))
    return waits


def _teacher(beside: Recipe, world_size: int, device: Device, tiles: int) -> tuple[float, float]:
    """Seconds and bytes sent of its forward pass of a micro-batch: half of what forward and backward send."""
    flops, sent = step_flops(beside, tiles), _sent_per_micro_batch(beside, 0, tiles)
    waits = _waits(beside, world_size, device, flops, 0, sent)
    return _compute(beside, device, flops, 0) + sum(waits.values()) / 2, sum(sent.values()) / 2


def _compute(recipe: Recipe, device: Device, flops: Flops, stage: int) -> float:
    """Seconds of a micro-batch on a rank of one stage, forward and backward."""
    parallel, fp8 = recipe.parallel, recipe.precision.fp8
    packs = recipe.train.micro_batch_size
    ranks, last = parallel.tensor * parallel.context, stage == parallel.pipeline - 1
    layers = stage_layers(recipe)[stage]
    part = layers / recipe.model.language.num_layers
    slower = HALVED ** math.log2(parallel.tensor)
    in_fp8 = fp8_layers(recipe, stage)
    kinds = {fp8.recipe: in_fp8, None: layers - in_fp8} if in_fp8 else {None: layers}  # layers of each precision
    text = recipe.model.language
    forward = 2 * recipe.data.sequence_length * text.num_layers * layer_weights(text) / flops.linear
    linear = packs * flops.linear * part / ranks
    done = linear * _again(recipe, Part.language, layers, forward)
    seconds = sum(done * count / layers / LINEAR[kind] for kind, count in kinds.items()) / slower / device.peak
    seconds += packs * flops.adapters * part / ranks / LINEAR[None] / device.peak  # in BF16; not measured
    seconds += _attention(recipe, device, flops, stage)
    launched = 1 / 3 if forward == 1 else 1.0  # forward alone, as a teacher's; assumed
    # Whether the weights have gradients doesn't matter here.
    moved = launched * 3 * forward * linear * _again(recipe, Part.language, layers)
    seconds += moved * ELEMENTWISE / text.hidden_size / (HBM * device.hbm)
    if not recipe.train.cuda_graphs:
        gaps, host = (sum(count * of[kind] for kind, count in kinds.items()) for of in (GAPS, HOST))
        seconds = max(seconds + launched * gaps, launched * host)
    if last:
        seconds += packs * flops.output / (OUTPUT * slower) / ranks / device.peak
        if distills(recipe):
            logits = packs * recipe.data.sequence_length * recipe.model.language.vocab_size / ranks
            seconds += logits * DIVERGENCE_BYTES / (HBM * device.hbm)
    if stage == 0 and flops.vision:
        share = ranks if parallel.share_tiles else 1
        vision = packs * flops.vision * _again(recipe, Part.vision, recipe.model.vision.num_layers) / share
        rate = VISION[fp8.recipe is not None and Part.vision in fp8.parts]
        seconds += max(vision / rate / device.peak, launched * recipe.model.vision.num_layers * HOST[None])
    return seconds


def _attention(recipe: Recipe, device: Device, flops: Flops, stage: int) -> float:
    parallel, layers = recipe.parallel, stage_layers(recipe)[stage]
    work = flops.attention * recipe.train.micro_batch_size * layers / recipe.model.language.num_layers
    full = recipe.train.recompute.language == Recompute.full
    work *= _again(recipe, Part.language, layers) if full else 1.0
    share = ATTENTION / (1 + HALF_LENGTH / recipe.data.sequence_length)
    return work / (parallel.tensor * parallel.context) / share / device.peak


def _again(recipe: Recipe, part: Part, layers: int, forward: float = 1 / 3) -> float:
    """Linear layers' work with what is computed again, over that without, of which ``forward`` is forward's share."""
    how = getattr(recipe.train.recompute, part.value)
    if how == Recompute.none or part in recipe.train.freeze:
        return 1.0
    if how == Recompute.full:
        limit = recipe.train.recompute.language_layers if part == Part.language else None
        return 1 + min(1.0, (layers if limit is None else limit) / layers) * forward
    shape = getattr(recipe.model, part.value)
    matrices = 3 if part == Part.language else 2  # of the MLP
    mlp = matrices * shape.hidden_size * shape.ffn_hidden_size
    if part == Part.language:
        attention = 2 * shape.hidden_size * (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels
    else:
        attention = 4 * shape.hidden_size**2
    return 1 + mlp / (mlp + attention) * forward


def _sent_per_micro_batch(recipe: Recipe, stage: int, tiles: int) -> dict[str, float]:
    """Bytes that a rank sends for one micro-batch, forward and backward, inside its model copy."""
    size = _size(recipe)
    parallel, text, packs = recipe.parallel, recipe.model.language, recipe.train.micro_batch_size
    t, c, layers = parallel.tensor, parallel.context, stage_layers(recipe)[stage]
    rows = recipe.data.sequence_length * packs / c
    hidden = rows * text.hidden_size * size
    again = 1.5 if recipe.train.recompute.language == Recompute.full else 1.0  # one more forward for each two passes
    # Two all-reduces a layer each way; with sequence parallelism each is a gather and a scatter, and backward gathers
    # the inputs of two linear layers once more.
    passes = layers * (10 if parallel.sequence else 8) * again
    passes += 4 if stage in (0, parallel.pipeline - 1) else 0  # embedding and output layer
    queries, keys = text.num_attention_heads * text.kv_channels / t, text.num_query_groups * text.kv_channels / t
    if parallel.context_comm == ContextComm.a2a:
        context = 2 * (2 * queries + 2 * keys) * rows * (c - 1) / c
    else:
        context = 2 * 2 * keys * rows * (c - 1)
    boundary = 2 * hidden / (t if parallel.sequence else 1) * (parallel.virtual_pipeline or 1)
    ranks, shape = t * c, geometry_of(recipe.model)
    features = 0.0
    if stage == 0 and parallel.share_tiles and ranks > 1:
        features = 2 * tiles * packs * shape.tokens_per_tile * text.hidden_size * size * (ranks - 1) / ranks
    return {
        "tensor": passes * hidden * (t - 1) / t,
        "context": context * layers * size * again,
        "pipeline": boundary if parallel.pipeline > 1 else 0.0,
        "tiles": features,
    }


def _size(recipe: Recipe) -> int:
    """Bytes of an activation."""
    return 2 if recipe.precision.dtype == Dtype.bf16 else 4


def _data_bytes(recipe: Recipe, copies: int, trained: int) -> tuple[float, float]:
    """Bytes that a rank sends in rings, once a step, to reduce the gradients and to gather the parameters."""
    ranks = copies * recipe.parallel.context
    one = trained * (ranks - 1) / ranks  # elements
    if recipe.parallel.distributed_optimizer:
        return 4.0 * one, one * _size(recipe)
    return 2 * 4.0 * one, 0.0  # an all-reduce


def _data(
    recipe: Recipe, device: Device, copies: int, trained: int, reduce: float, gather: float, micro_batch: float
) -> float:
    """Seconds that reduction and gathering add to a step.

    They hide behind one micro-batch's backward (two thirds) and forward, which they slow.

    Args:
        reduce, gather: bytes that a rank sends.
        micro_batch: seconds of one.
    """
    parallel = recipe.parallel
    group = parallel.tensor, copies * parallel.context
    if group[1] == 1:
        return 0.0
    buckets = math.ceil(trained / max(BUCKET, BUCKET_OF_RANK * group[1])) if parallel.overlap else 1
    rounds_to_reduce = 1 if parallel.distributed_optimizer else 2  # an all-reduce goes round the ring twice
    seconds = 0.0
    for sent, rounds, behind in ((reduce, rounds_to_reduce, micro_batch * 2 / 3), (gather, 1, micro_batch / 3)):
        if not sent:
            continue
        wanted = sent / _rate(device, *group) + buckets * rounds * _latency(*group)
        hidden = min(wanted, behind) if parallel.overlap else 0.0
        seconds += wanted - hidden + SLOWED * hidden
    return seconds


def _optimizer(recipe: Recipe, device: Device, copies: int, trained: int) -> float:
    shards = copies * recipe.parallel.context if recipe.parallel.distributed_optimizer else 1
    return trained * OPTIMIZER_BYTES / shards / (device.hbm * HBM)


def _rate(device: Device, stride: int, ranks: int) -> float:
    """Bytes/s that each rank of a group can send in a ring; the group's ranks are ``stride`` apart.

    A ring that crosses nodes leaves each of them once, and uses the network card of every rank it has there.
    """
    if stride * ranks <= GPUS_PER_NODE:
        return device.nvlink * LINK
    return min(device.nvlink, max(1, GPUS_PER_NODE // stride) * device.network) * LINK


def _latency(stride: int, ranks: int) -> float:
    """Seconds of a ring's start and of one round of it, ``ranks`` - 1 hops, whatever is sent.

    Of the hops as many cross to another node as there are other nodes, which is what NCCL counts.
    """
    between = min(ranks, -(-stride * ranks // GPUS_PER_NODE)) - 1
    return START + between * HOP_BETWEEN + (ranks - 1 - between) * HOP_INSIDE
