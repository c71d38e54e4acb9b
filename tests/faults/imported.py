"""What a rank imports; the process that ranks are forked from imports it once, and starts no thread."""

import launch.train  # noqa: F401
from tests.train.runs import import_deepspeed

import_deepspeed()
