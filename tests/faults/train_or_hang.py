"""``launch/train.py``, for torchrun, in a process that can be asked to hang."""

import sys

from longnet_dist.cli import train
from longnet_dist.cli.program.exit_status import run_cli
from tests.faults.ranks import hang_on_request

if __name__ == "__main__":
    hang_on_request()
    run_cli(lambda: train.main(sys.argv[1:], as_rank=True))
