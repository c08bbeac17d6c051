"""Several processes of one command on this machine, through torch.distributed's elastic launcher."""

import logging
import os
import signal
import sys
import tempfile
import uuid
import warnings
from pathlib import Path

from nemo_bluelm.children import python_environment
from nemo_bluelm.cli import worker
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.parent import bound_to_this_process

SHUTDOWN_SECONDS = 1800


def launch(arguments: list[str], nproc: int) -> int:
    """Run ``nemo-bluelm ARGUMENTS`` as ``nproc`` ranks and return the exit code of the whole.

    SIGINT and SIGTERM are passed on to the ranks; a rank that fails ends the others. The code is 2 for a user's
    mistake on any rank, 128 + n after signal n, otherwise the failing rank's own.

    Args:
        arguments: the command line of every rank, without ``--nproc``.
        nproc: number of processes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    # The agent gives ranks 30 s to end after a signal; they may have a checkpoint to write.
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, SHUTDOWN_SECONDS)
    # It logs every signal and prints a report with a traceback for every failure; the lines below say it once.
    logging.disable(logging.CRITICAL)

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    with tempfile.TemporaryDirectory(prefix="nemo-bluelm-") as folder:
        reports = Path(folder) / "reports"
        reports.mkdir()
        marks = {**bound_to_this_process(), **python_environment(), worker.REPORTS: str(reports)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # port 0: the store binds a free one itself, so two jobs never race for it
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "logs")),
        )
        command = elastic_launch(config, entrypoint=sys.executable)
        ours = os.environ.copy()
        os.environ.update(marks)  # for the ranks, which inherit it
        try:
            command("-u", "-m", "nemo_bluelm.cli.main", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _explain(reports, rank, failure.exitcode)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            worker.print_error(f"ended by {signal.Signals(error.sigval).name}")
            return 128 + error.sigval
        finally:
            os.environ.clear()
            os.environ.update(ours)
    return 0


def _explain(reports: Path, rank: int, code: int) -> int:
    messages = [file.read_text() for file in sorted(reports.iterdir(), key=lambda file: int(file.name))]
    if messages:
        worker.print_error(messages[0])
        return UserError.EXIT_CODE
    if code < 0:
        worker.print_error(f"rank {rank} was ended by {signal.Signals(-code).name}")
        return 128 - code
    worker.print_error(f"rank {rank} failed with exit code {code}; its own message is above")
    return code
