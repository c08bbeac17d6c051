"""Trains the transformers peer on the packs of a recipe: every form and micro-batch size it can take, and its best."""

import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch

from nemo_bluelm.bench.case import OUT_OF_MEMORY
from nemo_bluelm.bench.figures import is_out_of_memory, peak_memory, rates
from nemo_bluelm.bench.hf_batches import FORMS, HFBatch, is_single
from nemo_bluelm.bench.hf_model import HFModel
from nemo_bluelm.bench.machine import device_name
from nemo_bluelm.bench.profile import Profile
from nemo_bluelm.bench.work import work_of
from nemo_bluelm.config.schema import Dtype, Recipe
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.model.flops import peak_flops
from nemo_bluelm.runtime.later import Stamp


class Case(dict):
    """A row of the result: ``form``, ``micro_batch`` (packs), ``recompute``, then the figures or an ``error``."""

    @property
    def name(self) -> str:
        recompute = ", recompute" if self["recompute"] else ""
        return f"transformers, {self['form']}, micro-batch {self['micro_batch']}{recompute}"


def cases(recipe: Recipe, packs: list[list[PackedBatch]], micro_batches: list[int]) -> Iterator[tuple[Case, Callable]]:
    """Every case to try, as (row, tell): ``tell(True)`` when its memory sufficed, before the next one is asked for.

    Micro-batches grow until the memory runs out. Where it does for the smallest, layers are recomputed from then on.
    """
    single = all(is_single(pack) for step in packs for pack in step)
    for form in ("rows",) if single else ("packed", "padded"):
        fitted: dict[bool, bool] = {}
        for recompute in (False, True):
            for size in micro_batches:
                fits = []
                row = Case(form=form, micro_batch=size, recompute=recompute)
                yield row, fits.append
                if not (fits and fits[0]):
                    break
                fitted[recompute] = True
            if fitted.get(recompute):
                break


class Peer:
    """A model and its optimizer as a user of transformers sets them up.

    fp32 parameters and bf16 autocast (all fp32 for an fp32 recipe), SDPA, each layer compiled, fused AdamW, clipping.

    Attributes:
        device: where it lives, ``cuda`` or ``cpu``.
    """

    def __init__(self, recipe: Recipe, image_token: int, images: bool, compiled: bool, recompute: bool):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip = recipe.optim.clip_grad
        self._half = recipe.precision.dtype == Dtype.bf16
        torch.manual_seed(recipe.seed)
        with torch.device(self.device):
            self.model = HFModel(recipe.model, image_token, images).train()
        self.model.freeze(recipe.train.freeze)
        self.model.recompute = recompute
        if compiled:
            self.model.compile_layers()
        optim = recipe.optim
        self._optimizer = torch.optim.AdamW(
            [weight for weight in self.model.parameters() if weight.requires_grad],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def step(self, batches: list[HFBatch], targets: int) -> torch.Tensor:
        """One optimizer step; the mean loss over ``targets``, on the device."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            with torch.autocast(self.device, torch.bfloat16) if self._half else nullcontext():
                logits = self.model(batch.tokens, batch.tiles, batch.positions, batch.mask())
            loss = self.model.loss(logits, batch.labels) / targets
            del logits
            loss.backward()
            total += loss.detach()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total


def load_packs(recipe: Recipe, steps: int, threads: int) -> tuple[list[list[PackedBatch]], int]:
    """The packs of the first ``steps`` steps, and the image placeholder's id. The peer never waits for its data."""
    from nemo_bluelm.train.packs import open_packs

    loader = open_packs(recipe)
    size = recipe.train.global_batch_size
    with ThreadPoolExecutor(max(1, threads)) as pool:
        loaded = list(pool.map(lambda pack: loader.load(pack).batch, islice(loader.plan, steps * size)))
    return [loaded[start : start + size] for start in range(0, len(loaded), size)], loader.tokenizer.image


def measure_peers(
    recipe: Recipe,
    steps: int,
    warmup: int,
    micro_batches: list[int] | None,
    compiled: bool,
    write: Callable[[dict], None],
    profile: Path | None = None,
) -> None:
    """Run every case; ``write`` gets its row as soon as it is known.

    Args:
        micro_batches: packs in a forward pass to try; None: 1, 2, 4, ... up to the global batch.
        profile: write the kernels of one more step of each case there, the case's name in the file's.
    """
    packs, image_token = load_packs(recipe, warmup + steps, recipe.data.decode.threads)
    images = any(pack.tiles.size(0) for step in packs for pack in step)
    sizes = micro_batches or _doubling(recipe.train.global_batch_size)
    for row, tell in cases(recipe, packs, [size for size in sizes if size <= recipe.train.global_batch_size]):
        row["name"], row["compiled"] = row.name, compiled
        try:
            file = profile and profile.with_name(f"{profile.stem}_{row['form']}_{row['micro_batch']}{profile.suffix}")
            row |= _measure(recipe, packs, image_token, images, row, warmup, file)
            tell(True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            else:
                row["error"] = OUT_OF_MEMORY
        write(row)
        _free()


def _measure(recipe, packs, image_token: int, images: bool, row: Case, warmup: int, profile: Path | None) -> dict:
    peer = Peer(recipe, image_token, images, row["compiled"], row["recompute"])
    form, size = FORMS[row["form"]], row["micro_batch"]
    device, times, losses = torch.device(peer.device), [], []
    for step in packs:
        batches = [form(step[start : start + size]) for start in range(0, len(step), size)]
        if torch.cuda.is_available():
            batches = [batch.pinned() for batch in batches]
        targets = sum(pack.num_tokens for pack in step)
        begun = Stamp(device)  # what lies between two steps prepares their batches
        losses.append(peer.step(batches, targets))
        times.append((begun, Stamp(device)))
    seconds = [begun.seconds_until(ended) for begun, ended in times[warmup:]]
    held = [[work_of(pack, recipe.model, recipe.train.freeze) for pack in step] for step in packs[warmup:]]
    tokens, flops = ([sum(pack[part] for pack in step) for step in held] for part in (0, 1))
    if profile:
        kernels = Profile(profile)
        kernels.start()
        peer.step(batches, targets)
        kernels.finish()
    return {
        "parameters": sum(weight.numel() for weight in peer.model.parameters()),
        **rates(seconds, tokens, flops, 1, peak_flops(device_name())),
        "memory": peak_memory(),
        "loss": {"first": float(losses[0]), "last": float(losses[-1])},
        "seconds": [round(value, 5) for value in seconds],
    }


def _doubling(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _free() -> None:
    """Give back what a case held; compiled code too, since another shape would be compiled for any shape."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def append_line(path: Path) -> Callable[[dict], None]:
    """A ``write`` for :func:`measure_peers`: one JSON line a row."""

    def write(row: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return write
