"""A run in as many processes as a launcher started, each ending with the others."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence

from rich.console import Console

from ftfast.config.schema import TrainConfig
from ftfast.engine.deepspeed_settings import zero_stage
from ftfast.engine.liveness import BEAT_S, Liveness
from ftfast.engine.processes import Processes, StoppedElsewhere, join_processes, leave_processes
from ftfast.engine.run import TrainResult, train
from ftfast.errors import FtfastError


def train_together(
    config: TrainConfig,
    *,
    argv: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Join the processes of this job, train, and leave.

    Args:
        config: Resolved settings.
        argv: Command line, for the record.
        resume: Continue the run in ``config.out``.
        overwrite: Replace an earlier run there.
        console: Where the first process tells what happens.

    Returns:
        The result; complete in the first process.

    Raises:
        FtfastError: Anything a user can fix.
        SystemExit: In a process that ends because another one, which says why, could not go on.
    """
    processes = join_processes(config.train.device, config.train.timeout_s, zero_stage(config) is not None)
    try:
        with Liveness(processes):
            result = train(config, argv=argv, resume=resume, overwrite=overwrite, console=console, processes=processes)
    except StoppedElsewhere as stop:
        raise SystemExit(stop.exit_code) from stop
    except FtfastError:
        if not processes.several:
            leave_processes()
        raise
    except Exception as error:
        if not processes.several:
            leave_processes()
            raise
        _end_with_trace(processes, error, config.train.timeout_s)
    leave_processes()
    return result


def _end_with_trace(processes: Processes, error: Exception, timeout_s: float) -> None:
    """Show the traceback and end: an orderly exit would wait for exchanges that no longer happen."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    if processes.several and isinstance(error, RuntimeError):
        time.sleep(3 * BEAT_S)  # if another process died, the watching thread names it and ends this one
    print(
        f"error: process {processes.rank} of {processes.world_size} failed: {type(error).__name__}. Exchanges between "
        f"processes wait {timeout_s:g} s at most (train.timeout_s).",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
