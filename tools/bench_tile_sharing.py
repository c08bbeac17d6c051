"""Time three ways in which the ranks of a tensor-parallel group can get the tiles of one pack.

Every rank decodes; one decodes and broadcasts (gloo, or NCCL on GPUs: what the stack does); one decodes into shared
memory and the others copy. Wall time of the slowest rank and CPU time over all ranks, medians.

    python tools/bench_tile_sharing.py --ranks 2 --out bench/tile_sharing_cpu.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from nemo_bluelm.bench.images import make_images
from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.geometry import Geometry

ROUNDS = 10
IMAGES = 6  # about 60 tiles of 378 pixels
SHARED = "/dev/shm/nemo_bluelm_tiles"  # memory that every process of the machine can map


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.multiprocessing.spawn(_rank, (arguments.ranks, arguments.out), arguments.ranks)


def _rank(rank: int, ranks: int, out: Path | None) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=ranks)
    backend, geometry, images = get_backend("torch"), Geometry(), make_images(IMAGES)
    shape = torch.cat(backend.tiles(images, geometry)).shape
    shared = torch.from_file(SHARED, shared=True, size=shape.numel(), dtype=torch.uint8).view(shape)

    def decode() -> torch.Tensor:
        return torch.cat(backend.tiles(images, geometry))

    def every_rank_decodes() -> torch.Tensor:
        return decode().to(device)

    def broadcast() -> torch.Tensor:
        tiles = decode().to(device) if rank == 0 else torch.empty(shape, dtype=torch.uint8, device=device)
        dist.broadcast(tiles, 0)
        return tiles

    def through_shared_memory() -> torch.Tensor:
        if rank == 0:
            shared.copy_(decode())
        dist.barrier()
        return shared.to(device, copy=True)

    results = {way.__name__: _time(way, device) for way in (every_rank_decodes, broadcast, through_shared_memory)}
    dist.barrier()
    if rank == 0:
        report = {
            "ranks": ranks,
            "tiles": shape[0],
            "megabytes": shape.numel() / 1e6,
            "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} cores, {platform.machine()}",
            "torch": torch.__version__,
            "milliseconds": results,
        }
        print(json.dumps(report, indent=2))
        if out:
            out.write_text(json.dumps(report, indent=2) + "\n")
        os.remove(SHARED)
    dist.destroy_process_group()


def _time(way, device: torch.device) -> dict[str, float]:
    wall, cpu = [], []
    for _ in range(ROUNDS):
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times = torch.tensor([time.perf_counter() - started, time.process_time() - cpu_started], device=device)
        slowest = times.clone()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(times)
        wall.append(float(slowest[0]) * 1e3)
        cpu.append(float(times[1]) * 1e3)
    return {"wall": round(statistics.median(wall), 1), "cpu_all_ranks": round(statistics.median(cpu), 1)}


if __name__ == "__main__":
    main()
