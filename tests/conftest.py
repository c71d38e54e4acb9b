import os

import pytest
import torch

# Triton decides at its own import, which DeepSpeed's brings about, whether its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors gain nothing from threads, and forked ranks share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A token file of some source, for tests that train; DeepSpeed is imported once, before ranks are forked."""
    from tests.train.runs import import_deepspeed, write_corpus

    import_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "source.tokens")
