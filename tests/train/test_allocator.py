import subprocess
import sys

import pytest
import torch

from longnet_dist.train.allocator import prepare_allocator


def test_sets_what_the_user_has_not():
    environment = {}
    prepare_allocator(environment)
    assert environment["PYTORCH_ALLOC_CONF"].startswith("expandable_segments:True,")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_leaves_what_the_user_has(name):
    environment = {name: "max_split_size_mb:512"}
    prepare_allocator(environment)
    assert environment == {name: "max_split_size_mb:512"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_takes_it_after_its_import():
    """In a process of its own: the settings are read once, with the first use of a GPU."""
    code = (
        "import os, torch; from longnet_dist.train.allocator import prepare_allocator; prepare_allocator(os.environ); "
        "torch.zeros(1, device='cuda'); s = torch.cuda.memory._snapshot()['allocator_settings']; "
        "assert s['expandable_segments'] and s['pinned_num_register_threads'] == 8, s"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
