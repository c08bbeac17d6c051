"""Times ViT and projector alone, forward and backward, beside transformers' SigLIP."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from nemo_bluelm.bench.case import OUT_OF_MEMORY
from nemo_bluelm.bench.figures import is_out_of_memory, peak_memory, spread
from nemo_bluelm.bench.hf_model import HFModel
from nemo_bluelm.bench.machine import device_name
from nemo_bluelm.config.schema import Dtype, ParallelConfig, Recipe, Recompute, YarnConfig, geometry_of
from nemo_bluelm.model.flops import pack_flops, peak_flops
from nemo_bluelm.runtime.later import Stamp


def measure_vision(recipe: Recipe, tiles: int, steps: int, warmup: int, compiled: bool) -> list[dict]:
    """A row each for ours and for SigLIP with fp32 weights under bf16 autocast, and with bf16 weights.

    Gradients come from random numbers and stay in the weights; there is no optimizer. ``prepare`` must have been
    called.

    Args:
        tiles: in a batch.
        compiled: torch.compile each layer of SigLIP.
    """
    recipe = _small_language(recipe)
    work = pack_flops(recipe.model, [], tiles).total
    side = geometry_of(recipe.model).tile
    torch.manual_seed(recipe.seed)
    images = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8)
    images = images.to(_device())
    cases: dict[str, Callable] = {"nemo_bluelm": lambda: _ours(recipe, images, steps, warmup)}
    if recipe.precision.dtype == Dtype.bf16:
        cases["transformers, autocast"] = lambda: _theirs(recipe, images, steps, warmup, compiled, autocast=True)
    cases["transformers"] = lambda: _theirs(recipe, images, steps, warmup, compiled, autocast=False)
    rows = []
    for name, run in cases.items():
        row = {"name": f"{name}, {tiles} tiles", "tiles": tiles}
        try:
            row |= _figures(run(), tiles, work)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row["error"] = OUT_OF_MEMORY
        rows.append(row)
        _free()
    return rows


def _ours(recipe: Recipe, images: Tensor, steps: int, warmup: int) -> list[float]:
    from nemo_bluelm.runtime.plugin import BlueLM
    from nemo_bluelm.runtime.single import single_process_world
    from nemo_bluelm.train.losses import TokenLoss

    with single_process_world():
        plugin = BlueLM(recipe, image_token_id=0, loss=TokenLoss)
        plugin.configure_model()
        model = plugin.module.to(_device()).train()
        weights = [*model.vision.parameters(), *model.projector.parameters()]
        for weight in weights:  # where fused kernels add the gradient, as in Megatron's buffers
            weight.main_grad = torch.zeros(weight.shape, device=weight.device)
            weight.grad_added_to_main_grad = False

        def step(gradient: Tensor | None) -> Tensor:
            for weight in weights:
                weight.grad = None
            return _forward_backward(model.projector(model.vision(images)), gradient)

        return _times(step, steps, warmup)


def _theirs(recipe: Recipe, images: Tensor, steps: int, warmup: int, compiled: bool, autocast: bool) -> list[float]:
    device = _device()
    with torch.device(device):
        model = HFModel(recipe.model, image_token=0, images=True).train()
    if recipe.precision.dtype == Dtype.bf16 and not autocast:
        model = model.bfloat16()
    if compiled:
        model.compile_layers()

    def step(gradient: Tensor | None) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            visual = model.visual(images)
        return _forward_backward(visual, gradient)

    return _times(step, steps, warmup)


def _forward_backward(visual: Tensor, gradient: Tensor | None) -> Tensor:
    gradient = torch.randn_like(visual) if gradient is None else gradient
    visual.backward(gradient)
    return gradient


def _times(step: Callable[[Tensor | None], Tensor], steps: int, warmup: int) -> list[float]:
    gradient = None
    for _ in range(max(1, warmup)):
        gradient = step(gradient)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    stamps = [Stamp(gradient.device)]
    for _ in range(steps):
        step(gradient)
        stamps.append(Stamp(gradient.device))
    return [begun.seconds_until(ended) for begun, ended in zip(stamps, stamps[1:])]


def _figures(seconds: list[float], tiles: int, work: int) -> dict:
    times, peak = spread(seconds), peak_flops(device_name())
    rate = work / times["median"]
    return {
        "step_seconds": times,
        "tiles_per_second": round(tiles / times["median"], 1),
        "tflops": float(f"{rate / 1e12:.4g}"),
        "mfu": None if peak is None else round(rate / peak, 4),
        "memory": peak_memory(),
        "seconds": [round(value, 5) for value in seconds],
    }


def _small_language(recipe: Recipe) -> Recipe:
    """The recipe with a language model of one layer and few tokens, which is built but not run."""
    whole = recipe.model.language
    language = replace(whole, num_layers=1, ffn_hidden_size=128, vocab_size=128, yarn=YarnConfig())
    fp8 = replace(recipe.precision.fp8, bf16_first_layers=0, bf16_last_layers=0)
    recompute = replace(recipe.train.recompute, language=Recompute.none, language_layers=None)
    return replace(
        recipe,
        model=replace(recipe.model, language=language),
        parallel=ParallelConfig(),
        precision=replace(recipe.precision, fp8=fp8),
        train=replace(recipe.train, freeze=[], cuda_graphs=False, recompute=recompute),
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
