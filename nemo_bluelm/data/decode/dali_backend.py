"""The ``dali`` backend: NVIDIA DALI decodes JPEG, resizes and cuts tiles, on the CPU or a GPU.

Plain JPEG goes to DALI's decoder, on a GPU its fast path. Pillow decodes everything else, and what DALI refuses, for
the same DALI graph: DALI's decoders of other formats are no faster, and read 16 bits and odd files in their own way.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_bluelm.data.decode import BadSample
from nemo_bluelm.data.decode.pillow import decode
from nemo_bluelm.data.headers import BadImage, open_image
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

_MAX_BATCH = 64  # images a run
_MAX_BATCH_PIXELS = 64_000_000  # and their pixels, unless one alone has more
_END_OF_IMAGE = b"\xff\xd9"


class _Job(NamedTuple):
    """One image of a call; ``plain``: a JPEG for DALI's decoder."""

    position: int
    data: bytes
    width: int
    height: int
    plain: bool


class DaliBackend:
    """See :class:`~nemo_bluelm.data.decode.Backend`.

    Args:
        device: ``cpu``, or ``gpu`` for the current CUDA device.
        threads: DALI's, and as many for Pillow.

    Raises:
        UserError: DALI is not installed, or there is no CUDA device for ``gpu``.
    """

    name = "dali"

    def __init__(self, device: str, threads: int):
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UserError(f"DALI can't be imported ({error}); pip install 'nemo-bluelm[dali]'") from error
        if device == "gpu" and not torch.cuda.is_available():
            raise UserError("there is no CUDA device for DALI; take device cpu")
        self._device, self._threads = device, threads
        self._device_id = torch.cuda.current_device() if device == "gpu" else None
        self._map = ThreadPoolExecutor(threads, "decode-dali").map if threads > 1 else map
        self._pipelines: dict = {}
        self._lock = threading.Lock()  # a pipeline runs one batch at a time

    def tiles(self, images: Sequence[bytes], geometry: Geometry) -> list[Tensor | BadSample]:
        """See :class:`~nemo_bluelm.data.decode.Backend`."""
        results: list = list(map(_read, range(len(images)), images))
        jobs = [job for job in results if isinstance(job, _Job)]
        with self._lock:
            refused = []
            for batch in _batches([job for job in jobs if job.plain]):
                refused += self._decode(batch, geometry, results)
            for batch in _batches([job for job in jobs if not job.plain] + refused):
                self._decode_by_pillow(batch, geometry, results)
        return results

    def _decode(self, jobs: list[_Job], geometry: Geometry, results: list) -> list[_Job]:
        """Puts tiles into ``results``; returns the jobs that DALI's decoder refuses.

        DALI names one bad image at most and loses the whole batch, so a failing one is halved until the bad are alone.
        """
        try:
            self._run(True, jobs, [np.frombuffer(job.data, np.uint8) for job in jobs], geometry, results)
        except RuntimeError:
            half = len(jobs) // 2
            if not half:
                return jobs
            return self._decode(jobs[:half], geometry, results) + self._decode(jobs[half:], geometry, results)
        return []

    def _decode_by_pillow(self, jobs: list[_Job], geometry: Geometry, results: list) -> None:
        """Puts tiles or the reason why there are none into ``results``."""
        good, pixels = [], []
        for job, decoded in zip(jobs, self._map(_pixels, jobs)):
            if isinstance(decoded, BadSample):
                results[job.position] = decoded
            else:
                good.append(job)
                pixels.append(decoded)
        if good:
            self._run(False, good, pixels, geometry, results)

    def _run(self, encoded: bool, jobs: list[_Job], sources: list, geometry: Geometry, results: list) -> None:
        key = (encoded, geometry.tile)
        if key not in self._pipelines:
            self._pipelines[key] = _build(*key, self._device, self._device_id, self._threads)
        plans = [_plan(geometry, job.width, job.height) for job in jobs]
        inputs = {name: [plan[name] for plan in plans] for name in plans[0]}
        (output,) = self._pipelines[key].run(source=sources, **inputs)
        # A 1 x 1 grid's thumbnail is left off.
        counts = [geometry.tiles(job.width, job.height) for job in jobs]
        tiles = [torch.from_dlpack(output[i])[:count] for i, count in enumerate(counts)]
        if self._device == "gpu":
            # DALI takes its memory back when the tensor goes, though a queued kernel of torch's may still read it.
            tiles = [image.clone() for image in tiles]
            torch.cuda.current_stream(self._device_id).synchronize()
        for job, image in zip(jobs, tiles):
            results[job.position] = image


def _read(position: int, data: bytes) -> _Job | BadSample:
    try:
        image, header = open_image(data)
    except BadImage as error:
        return BadSample(str(error))
    return _Job(position, data, header.width, header.height, _is_plain(image, data))


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether an image is a JPEG that DALI's decoders, on CPU and GPU, read as Pillow does."""
    # One without its end is cut or followed by something: decoders disagree about those.
    if image.format != "JPEG" or not data.endswith(_END_OF_IMAGE):
        return False
    if image.mode == "RGB":  # the GPU's decoder takes all colours for YCbCr
        return image.info.get("adobe_transform") != 0 and bytes(channel[0] for channel in image.layer) != b"RGB"
    return image.mode == "L"


def _pixels(job: _Job) -> np.ndarray | BadSample:
    """uint8 [height, width, 3]."""
    try:
        return np.asarray(decode(job.data))
    except BadImage as error:
        return BadSample(str(error))


def _batches(jobs: list[_Job]) -> list[list[_Job]]:
    """Jobs in batches of a bounded number of images and pixels."""
    batches, pixels = [], 0
    for job in jobs:
        size = job.width * job.height
        if not batches or len(batches[-1]) == _MAX_BATCH or pixels + size > _MAX_BATCH_PIXELS:
            batches.append([])
            pixels = 0
        batches[-1].append(job)
        pixels += size
    return batches


def _plan(geometry: Geometry, width: int, height: int) -> dict[str, np.ndarray]:
    """DALI's arguments for one image, rows before columns."""
    tile = geometry.tile
    cols, rows = geometry.grid(width, height)
    fit_width, fit_height = geometry.fit(width, height)
    size, canvas = np.array([fit_height, fit_width]), np.array([rows * tile, cols * tile])
    return {
        "height": np.array([height], np.float32),
        "size": size.astype(np.float32),
        "start": (-((canvas - size) // 2)).astype(np.int32),  # of the canvas in the image: negative is padded
        "canvas": canvas.astype(np.int32),
        "cut": np.array([rows, tile, cols, tile, 3], np.int32),
    }


def _build(encoded: bool, tile: int, device: str, device_id: int | None, threads: int) -> Any:
    """The pipeline: ``source`` and what ``_plan`` gives in, ragged uint8 [n + 1, 3, T, T] out, the thumbnail last."""
    from nvidia.dali import fn, pipeline_def, types

    # Only the dynamic executor survives a failing batch; a run takes its inputs when nothing is prefetched.
    @pipeline_def(
        batch_size=_MAX_BATCH, num_threads=threads, device_id=device_id, exec_dynamic=True, prefetch_queue_depth=1
    )
    def pipeline():
        if encoded:
            source = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
            where = "mixed" if device == "gpu" else "cpu"
            image = fn.decoders.image(source, device=where, output_type=types.RGB, jpeg_fancy_upsampling=True)
        else:
            source = fn.external_source(name="source", dtype=types.UINT8, ndim=3, layout="HWC")
            image = source.gpu() if device == "gpu" else source
        height, size = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("height", "size"))
        start, canvas, cut = (
            fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "canvas", "cut")
        )

        def resize(target_height, target_width):
            # As Pillow: across, rounded and clipped to 8 bits, then down. DALI alone clips once, at the end.
            resized = image
            for target in (fn.cat(height, target_width), fn.cat(target_height, target_width)):
                resized = fn.resize(resized, size=target, interp_type=types.INTERP_CUBIC, antialias=True)
            return resized

        fitted = resize(size[0:1], size[1:2])
        fitted = fn.slice(fitted, start=start, shape=canvas, axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0])
        tiles = fn.transpose(fn.reshape(fitted, shape=cut, layout=""), perm=[0, 2, 4, 1, 3])
        tiles = fn.reshape(tiles, shape=[-1, 3, tile, tile], layout="")
        side = types.Constant(np.array([tile], np.float32))
        thumbnail = fn.transpose(resize(side, side), perm=[2, 0, 1])
        thumbnail = fn.reshape(thumbnail, shape=[1, 3, tile, tile], layout="")
        return fn.cat(tiles, thumbnail, axis=0)

    built = pipeline()
    built.build()
    return built
