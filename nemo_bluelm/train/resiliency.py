"""Hooks of nvidia-resiliency-ext, where it is installed: its launcher's heartbeats, and its search for slow GPUs."""

import importlib.util
import logging
import os
from pathlib import Path

from lightning.pytorch import Callback

from nemo_bluelm.errors import UserError

# How ft_launcher tells ranks where their monitor listens (nvidia_resiliency_ext.fault_tolerance.data).
FT_MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
_FINISHED = "FAULT_TOL_FINISHED_FLAG_FILE"  # made when training is over, for the script that starts jobs
_LOGGER = "nemo_bluelm.stragglers"
_SLOW = 0.7  # of the fastest GPU's speed, or of its own before; the default of the package's examples


def resiliency_callbacks(run_dir: Path, straggler_report: float) -> list[Callback]:
    """Callbacks for what is asked for: heartbeats under ``ft_launcher``, stragglers by ``train.straggler_report``.

    Args:
        straggler_report: seconds between two looks for GPUs that are slower than others; 0: none.

    Raises:
        UserError: the package is missing.
    """
    found: list[Callback] = []
    if FT_MONITOR in os.environ:
        _require("the ranks were started by ft_launcher")
        from nvidia_resiliency_ext.ptl_resiliency import FaultToleranceCallback

        folder = run_dir / "fault_tolerance"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(_FINISHED, str(folder / "finished"))
        found.append(FaultToleranceCallback(autoresume=True, calculate_timeouts=True, exp_dir=folder))
    if straggler_report:
        _require(f"train.straggler_report is {straggler_report:g}")
        from nvidia_resiliency_ext.ptl_resiliency import StragglerDetectionCallback

        logging.getLogger(_LOGGER).setLevel(logging.WARNING)
        found.append(
            StragglerDetectionCallback(
                report_time_interval=straggler_report,
                calc_relative_gpu_perf=True,
                calc_individual_gpu_perf=True,
                num_gpu_perf_scores_to_print=0,
                gpu_relative_perf_threshold=_SLOW,
                gpu_individual_perf_threshold=_SLOW,
                stop_if_detected=False,
                enable_ptl_logging=False,
                logger_name=_LOGGER,
            )
        )
    return found


def _require(why: str) -> None:
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise UserError(f"{why}, but nvidia-resiliency-ext isn't installed; pip install nvidia-resiliency-ext")
