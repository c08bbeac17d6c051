"""datatrove's executors behind our recipe: tasks in processes of this machine, or job arrays on Slurm."""

import contextlib
import io
import subprocess

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.io import get_datafolder
from datatrove.utils.logging import logger

from nemo_bluelm.data.curate.pipeline import Stage, build_stages
from nemo_bluelm.data.curate.schema import CurationRecipe
from nemo_bluelm.errors import UserError

__all__ = ["build_stages", "get_datafolder", "run_here", "script", "submit"]

logger.remove()  # its lines go to each task's log file; the console is ours


def run_here(stage: Stage, workers: int) -> None:
    """Run the tasks of a stage that aren't completed, ``workers`` at a time."""
    tasks = stage.tasks
    _Here(stage.pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=stage.logs).run()
    logger.remove()


class _Here(LocalPipelineExecutor):
    def _run_for_rank(self, rank: int, local_rank: int = 0):
        with contextlib.redirect_stderr(io.StringIO()):
            return super()._run_for_rank(rank, local_rank)


class _OnSlurm(SlurmPipelineExecutor):
    def launch_merge_stats(self):
        """Nothing: our report reads the statistics of every task, a job of its own would only wait in the queue."""


def submit(stages: list[Stage], recipe: CurationRecipe) -> str | None:
    """Submit the tasks that aren't completed, each stage to start when the one before has succeeded.

    Returns:
        The last job's id, or None if all is done.

    Raises:
        UserError: there is no sbatch, or it refuses a job.
    """
    last = None
    for stage in stages:
        last = _executor(stage, recipe, last)
    try:
        last.run()
    except FileNotFoundError as error:
        raise UserError("sbatch is not on this machine; run this where jobs are submitted") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused a job (exit code {error.returncode}); its message is above") from error
    return None if last.job_id == -1 else last.job_id


def script(stage: Stage, recipe: CurationRecipe) -> str:
    """The sbatch script of a stage."""
    executor = _executor(stage, recipe, None)
    limit = recipe.executor.slurm.max_array_size
    return executor.get_launch_file_contents(
        executor.get_sbatch_args(min(stage.tasks, limit)), f"srun -l launch_pickled_pipeline {stage.logs}/executor.pik"
    )


def _executor(stage: Stage, recipe: CurationRecipe, before: SlurmPipelineExecutor | None) -> SlurmPipelineExecutor:
    slurm = recipe.executor.slurm
    return _OnSlurm(
        stage.pipeline,
        tasks=stage.tasks,
        time=slurm.time,
        partition=slurm.partition,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.mem_per_cpu_gb,
        workers=slurm.running,
        max_array_size=slurm.max_array_size,
        job_name=f"{recipe.name}-{stage.name}",
        qos=slurm.qos,
        env_command=slurm.setup,
        sbatch_args=dict(slurm.sbatch),
        depends=before,
        logging_dir=stage.logs,
    )
