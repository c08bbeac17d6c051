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

SHUTDOWN_SECONDS = 1800  # that ranks get after a signal to us: they may have a checkpoint to write
FAILURE_SECONDS = 10  # that they get after one of them failed: a checkpoint takes all of them


def launch(arguments: list[str], nproc: int, max_restarts: int = 0) -> int:
    """Run ``nemo-bluelm ARGUMENTS`` as ``nproc`` ranks and return the exit code of the whole.

    SIGINT and SIGTERM are passed on to the ranks; a rank that fails ends the others. The code is 2 for a user's
    mistake on any rank, 128 + n after signal n, otherwise the failing rank's own.

    Args:
        arguments: the command line of every rank, without ``--nproc``.
        nproc: number of processes.
        max_restarts: how often all ranks are started again where one crashed or was killed; a user's mistake and a
            signal to this process end the whole at once.
    """
    for restart in range(max_restarts + 1):
        code, crashed = _launch(arguments, nproc)
        if not crashed or restart == max_restarts:
            return code
        print(f"started again, restart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
    raise AssertionError


def _launch(arguments: list[str], nproc: int) -> tuple[int, bool]:
    """The exit code, and whether a rank crashed or was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    # The agent gives ranks 30 s to end, whatever ends them; how to say another time differs between versions.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, SHUTDOWN_SECONDS)
    LocalElasticAgent._stop_workers = lambda agent, group: agent._shutdown(signal.SIGTERM, FAILURE_SECONDS)
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
            code = _explain(reports, rank, failure.exitcode)
            return code, code != UserError.EXIT_CODE
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            worker.print_error(f"ended by {signal.Signals(error.sigval).name}")
            return 128 + error.sigval, False
        finally:
            os.environ.clear()
            os.environ.update(ours)
    return 0, False


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
