import weakref

import torch

from longnet_dist.engine.execution import Execution
from longnet_dist.engine.saved_tensors import PinnedPool
from longnet_dist.model.longnet import LongNet
from tests.engine.test_block_run import model_config


def test_what_is_offloaded_is_forgotten_blocks_later_and_with_the_first_backward():
    pool, kept, held = PinnedPool(behind=1, slab_bytes=64), [], []
    for number in range(4):
        saved, tensor = pool.saved_tensors(offload=number < 3), torch.full((50,), float(number))
        saved.put("x", tensor)
        kept.append(saved)
        held.append(weakref.ref(tensor.untyped_storage()))
        del tensor
        alive = [storage() is not None for storage in held]
        assert alive == [index >= number - 1 for index in range(number + 1)]
    kept[3].fetch()
    assert [storage() is not None for storage in held] == [False, False, False, True]
    for number in (3, 2, 1, 0):
        assert torch.equal(kept[number].take("x"), torch.full((50,), float(number)))
        assert kept[number].take("x") is None


def test_a_forward_without_a_backward_leaves_nothing():
    model = LongNet(model_config(), execution=Execution("selective", cache_qkv=1, offload=True))
    pool, tokens = model.blocks[0].engine.pool, torch.zeros(2, 31, dtype=torch.int64)
    saved = []
    make = pool.saved_tensors
    pool.saved_tensors = lambda offload: saved.append(weakref.ref(made := make(offload))) or made
    counts = []
    for _ in range(4):
        model(tokens, tokens)
        counts.append((pool.num_slabs, sum(reference() is not None for reference in saved)))
    assert counts[0] == counts[-1], counts
    model(tokens, tokens).loss.backward()
    assert pool.num_slabs == counts[0][0] or pool.num_slabs <= 2 * counts[0][0]
    assert len(pool._free) == pool.num_slabs
    assert not any(reference() for reference in saved)
