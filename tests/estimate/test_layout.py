import pytest

from longnet_dist.config.loading import parse_config
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.layout import RunLayout


def layout(world_size, device_type="cuda", **sections):
    values = {"model": {"name": "tiny"}, "train": {"output_dir": "run", "steps": 1, "batch_size": 4}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return RunLayout.of(parse_config(values), world_size, device_type)


def test_the_rows_of_a_rank():
    split = layout(4, data={"sequence_length": 1000}, parallel={"data": 2}, train={"chunk_length": 300})
    assert (split.num_ranks, split.num_chunks, split.accumulation, split.passes) == (4, 4, 1, 4)
    assert (split.micro_batch_size, split.local_tokens, split.itemsize) == (2, 300, 2)
    assert (split.last_chunk.start, split.last_chunk.stop, split.last_chunk.rows_per_rank) == (900, 1000, 50)


@pytest.mark.parametrize(("device_type", "itemsize"), [("cuda", 2), ("cpu", 4)])
def test_the_precision_is_the_devices(device_type, itemsize):
    assert layout(1, device_type).itemsize == itemsize


def test_sequences_of_the_baselines_are_not_split():
    sparse = {"model": {"attention": "sparse"}, "data": {"sequence_length": 1024}}
    assert layout(2, parallel={"data": 2}, **sparse).num_ranks == 2
    with pytest.raises(ConfigError, match=r"model.attention=sparse .* parallel.sequence is 2; use parallel.sequence=1"):
        layout(2, **sparse)
    with pytest.raises(ConfigError, match=r"train.chunk_length is 256; use train.chunk_length=1024"):
        layout(1, train={"chunk_length": 256}, **sparse)
    with pytest.raises(ConfigError, match=r"data.documents is true; use data.documents=false"):
        layout(1, **sparse | {"data": {"sequence_length": 1024, "documents": True}})
    assert layout(2, **sparse | {"model": {"attention": "full"}}).num_ranks == 2
