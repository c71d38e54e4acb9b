"""torchrun on every node of a SLURM job: ``srun python launch/slurm/torchrun.py`` and torchrun's arguments.

It differs from torchrun in four things:

* the number of nodes, and which one this is, are SLURM's; every node has a folder of its own in ``--log-dir``;
* the exit status is that of the first rank that failed, where torchrun always says 1, so that the batch script can tell
  a run that asks to be queued again from one that broke;
* SIGUSR1 passes it by: SLURM sends the signal to all processes of a task, but means the ranks;
* a failure prints a line instead of a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from torch.distributed.run import parse_args

from longnet_dist.cli.program.ranks import exit_status
from longnet_dist.errors import USER_ERROR_STATUS

LAST_QUESTIONS_SECONDS = 2.0


def main() -> int:
    """Start the ranks of this node, wait for them, and return the exit status."""
    try:
        nodes, node = os.environ["SLURM_STEP_NUM_NODES"], os.environ["SLURM_NODEID"]
    except KeyError as error:
        print(f"error: srun sets {error}, but it is not there; use srun, or torchrun itself", file=sys.stderr)
        return USER_ERROR_STATUS
    options = parse_args([f"--nnodes={nodes}", f"--node-rank={node}", *sys.argv[1:]])  # type: ignore[no-untyped-call]
    if options.log_dir:
        options.log_dir = os.path.join(options.log_dir, f"node{node}")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    status = exit_status(options)
    if status == 0 and node == "0" and nodes != "1":
        # This process keeps the store, which the others still ask whether all have finished; or they log tracebacks.
        time.sleep(LAST_QUESTIONS_SECONDS)
    return status


if __name__ == "__main__":
    sys.exit(main())
