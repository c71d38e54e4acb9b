"""What a rank imports; the process that ranks are forked from imports it once, and starts no thread."""

import longnet_dist.cli.program.ranks
import longnet_dist.train.loop  # noqa: F401
from tests.train.runs import import_deepspeed

import_deepspeed()
