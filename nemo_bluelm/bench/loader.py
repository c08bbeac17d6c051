"""Measures the decode backends, beside transformers' processors on the CPU, or on a GPU beside copying to it.

CPU time is that of the whole process, all its threads, per image; it is what a shared or busy machine changes least.
Rounds interleave what is compared, and ratios are taken within a round.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from statistics import mean, median

import torch
from torch import Tensor

from nemo_bluelm.bench.machine import machine, versions
from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

BATCH = 16  # images a call of a backend
_PACKAGES = ("torch", "torchvision", "transformers", "pillow", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")

Path = Callable[[Sequence[bytes]], list[Tensor]]


def bench_cpu(names: Sequence[str], images: list[bytes], rounds: int, threads: int, say: Callable) -> dict:
    """Backends and transformers' processors on the CPU: CPU time with one thread, images a second with ``threads``.

    Args:
        names: backends.
        say: gets a word on each step.

    Returns:
        What ``--json`` prints: ``machine``, ``versions``, ``settings``, ``paths`` (one per row), ``notes``.

    Raises:
        UserError: a backend, or the GPU, is not there.
    """
    from nemo_bluelm.bench.peers import peers

    geometry = Geometry()
    one = {name: _backend(name, geometry) for name in names}
    many = {name: _backend(name, geometry, threads=threads) for name in names}
    others, notes = peers(geometry)
    with ThreadPoolExecutor(threads) as pool:
        one |= {name: _each(map, run) for name, run in others.items()}
        many |= {name: _each(pool.map, run) for name, run in others.items()}
        rows = _compare(one, many, images, rounds, say)
    for row in rows:
        row["ratio"] = {name: _ratio(row, other) for other in rows if (name := other["name"]) in others}
    _add_parity(rows, {name: one[name] for name in names}, geometry, images)
    return _report("cpu", geometry, images, rounds, threads, rows, notes)


def bench_gpu(names: Sequence[str], images: list[bytes], rounds: int, threads: int, say: Callable) -> dict:
    """Tiles on the GPU: ``dali`` decodes there, the others' tiles are copied there from pinned memory.

    CPU time here is with ``threads`` threads, as images a second. Arguments, returns and errors as
    :func:`bench_cpu`.
    """
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device; take --device cpu")
    geometry = Geometry()
    paths = {
        f"{name} on the gpu" if name == "dali" else f"{name} + copy": _on_gpu(name, geometry, threads) for name in names
    }
    rows = _compare(paths, paths, images, rounds, say)
    _add_parity(rows, paths, geometry, images)
    return _report("gpu", geometry, images, rounds, threads, rows, [])


def _backend(name: str, geometry: Geometry, device: str = "cpu", threads: int = 1) -> Path:
    backend = get_backend(name, device, threads)

    def run(images: Sequence[bytes]) -> list[Tensor]:
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return [tiles for batch in batches for tiles in backend.tiles(batch, geometry)]

    return run


def _each(mapping: Callable, run: Callable[[bytes], Tensor]) -> Path:
    return lambda images: list(mapping(run, images))


def _on_gpu(name: str, geometry: Geometry, threads: int) -> Path:
    run = _backend(name, geometry, "gpu" if name == "dali" else "cpu", threads)

    def to_gpu(images: Sequence[bytes]) -> list[Tensor]:
        tiles = run(images)
        if name != "dali":
            tiles = [image.pin_memory().to("cuda", non_blocking=True) for image in tiles]
        torch.cuda.synchronize()
        return tiles

    return to_gpu


def _compare(one: dict[str, Path], many: dict[str, Path], images: list[bytes], rounds: int, say: Callable) -> list:
    """A row per path: ``cpu_ms`` of every round and its summary, ``images_per_s`` at best, ``tiles`` per image."""
    rows = {name: {"name": name, "rounds": [], "wall": []} for name in one}
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # a path's threads are the ones that it was given
    try:
        for name in one:
            rows[name]["tiles"] = mean(len(tiles) for tiles in one[name](images))  # and it warms up
            many[name](images)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name, row in rows.items():
                started = time.process_time()
                one[name](images)
                row["rounds"].append(round(1000 * (time.process_time() - started) / len(images), 3))
                started = time.perf_counter()
                many[name](images)
                row["wall"].append(len(images) / (time.perf_counter() - started))
    finally:
        torch.set_num_threads(intra_op)
    for row in rows.values():
        times = row["rounds"]
        row["cpu_ms"] = {"median": median(times), "min": min(times), "max": max(times)}
        row["images_per_s"] = round(max(row.pop("wall")), 1)
    return list(rows.values())


def _ratio(row: dict, other: dict) -> float:
    return round(median(ours / theirs for ours, theirs in zip(row["rounds"], other["rounds"])), 3)


def _add_parity(rows: list[dict], paths: dict[str, Path], geometry: Geometry, images: list[bytes]) -> None:
    """``parity`` to Pillow in levels of 255: the largest difference, and the mean over the images."""
    reference = _backend("pil", geometry)(images)
    for row in rows:
        if row["name"] in paths:
            pairs = zip(paths[row["name"]](images), reference)
            differences = [(ours.cpu().int() - theirs.int()).abs() for ours, theirs in pairs]
            largest = max(int(difference.max()) for difference in differences)
            row["parity"] = {"max": largest, "mean": round(mean(float(each.float().mean()) for each in differences), 4)}


def _report(device: str, geometry: Geometry, images: list, rounds: int, threads: int, rows: list, notes: list) -> dict:
    return {
        "bench": "loader",
        "machine": machine(device),
        "versions": versions(_PACKAGES),
        "settings": {
            "device": device,
            "geometry": asdict(geometry),
            "images": len(images),
            "mean_bytes": round(mean(map(len, images))),
            "rounds": rounds,
            "threads": threads,
            "cpu_ms_threads": 1 if device == "cpu" else threads,
        },
        "paths": rows,
        "notes": notes,
    }
