import pytest

from longnet_dist.errors import ConfigError
from longnet_dist.train.setup import RunSetup
from tests.train.runs import run, tiny_config, write_corpus

SETTINGS = [
    (),
    ("train.micro_batch_size=1", "deepspeed.zero_stage=2", "train.clip_norm=0.1"),
    (
        "train.length_warmup=2",
        "train.shortest_length=16",
        "train.activation_checkpointing=full",
        "train.precision=fp32",
    ),
]

KEYS = "step", "loss", "grad_norm", "validation_loss"


@pytest.fixture(name="data", scope="module")
def _data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "a.tokens")


@pytest.mark.parametrize("settings", SETTINGS, ids=["whole", "accumulated", "warm-up"])
def test_a_run_with_graphs_has_the_losses_and_weights_of_one_without(tmp_path, data, settings):
    found = []
    for name, graph in (("graph", "true"), ("plain", "false")):
        own = f"train.cuda_graph={graph}", "train.steps=5", "train.validate_every=2", "train.validation_tokens=64"
        metrics = run(1, tiny_config(tmp_path / name, data, *settings, *own))
        found.append([[line.get(key) for key in KEYS] for line in metrics])
    assert len(found[0]) >= 5
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train.chunk_length=16", "train.chunk_length is 16"),
        ("data.documents=true", "data.documents is true"),
        ("deepspeed.zero_stage=3", "deepspeed.zero_stage is 3"),
        ("model.attention=sparse", "model.attention is sparse"),
        ("parallel.sequence=2", "parallel.sequence is 2"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, data, setting, named):
    config = tiny_config(tmp_path / "run", data, setting, "train.cuda_graph=true")
    with pytest.raises(ConfigError, match=f"train.cuda_graph=true .* but {named}; use .*, or train.cuda_graph=false"):
        RunSetup.make(config, 2 if "sequence" in setting else 1, "cpu")
