"""Imported once by the process from which commands are forked: they begin at once, and it has no threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the cores to other tests

from longnet_dist.train import loop  # noqa: F401
from tests.train.runs import import_deepspeed

import_deepspeed()  # type: ignore[no-untyped-call]
