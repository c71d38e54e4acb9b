import importlib.util
import os
import signal
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

# Triton decides at its own import, which DeepSpeed's brings about, whether its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _release(text):
    return tuple(int(part) for part in text.split(".")[:2])


def _hide_triton():
    """Return why Triton is hidden from the tests, as if it were not installed, or an empty string.

    The interpreter of Triton 3.6 makes numbers of arrays of one element, which NumPy 2.4 refuses; that of 3.7 does not.
    torch 2.11 pins Triton 3.6, and nothing pins NumPy for it, because compiled kernels run with any.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        return ""
    if _release(version("triton")) >= (3, 7) or _release(np.__version__) < (2, 4):
        return ""
    sys.modules["triton"] = None
    return f"no kernel is tested: Triton {version('triton')} interprets them with numpy<2.4 only, not {np.__version__}"


HIDDEN = _hide_triton()


def pytest_report_header():
    return HIDDEN or None


# A shell lets its background jobs ignore an interrupt, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small tensors gain nothing from threads, and forked ranks share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A token file of some source, for tests that train; DeepSpeed is imported once, before ranks are forked."""
    from tests.train.runs import import_deepspeed, write_corpus

    import_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "source.tokens")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """DeepSpeed leaves a local rank behind in one test, by which accelerate would wait for other ranks in the next."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
