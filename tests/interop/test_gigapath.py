"""GigaPath's slide encoder gives GigaPath's vectors, also for batches of unequal slides."""

import pytest
import torch

from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.interop import SlideEncoder, gigapath_slide_encoder
from longnet_dist.interop.gigapath import slide_segments, to_gigapath
from longnet_dist.model.pretrained import save_pretrained
from longnet_dist.numerics import log_once
from tests.interop.drawn import CASES, features, places, slide_weights

SMALL = {"depth": 3, "dim": 256, "heads": 16, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def weights():
    return slide_weights("enc12l768d", 12)


@pytest.fixture(scope="module")
def small():
    return slide_weights("8l256d", 3)


@pytest.mark.parametrize("name", CASES["cases"])
def test_vectors_are_gigapaths(name, weights):
    case = CASES["cases"][name]
    encoder = gigapath_slide_encoder(
        {"model": weights}, max_wsi_size=case["max_wsi_size"], global_pool=case["global_pool"]
    )
    assert sum(parameter.numel() for parameter in encoder.parameters()) == case["parameters"]
    assert list(encoder.encoder.config.segment_lengths) == case["segment_length"]
    with torch.no_grad():
        found = encoder(
            features(name, case["tiles"]),
            places(case["tiles"], case["slide_ngrids"]),
            all_layers=case["all_layer_embed"],
        )
    for vector, expected in zip(found, case["outputs"], strict=True):
        assert vector.shape == (1, 768)
        for part, numbers in ((vector[0, :8], expected["first"]), (vector[0, -4:], expected["last"])):
            assert (part - torch.tensor(numbers)).abs().max() < 1e-4
        assert abs(vector.norm() - expected["norm"]) < 1e-4
        assert abs(vector.double().sum() - expected["sum"]) < 1e-3


@pytest.mark.parametrize("global_pool", [False, True])
def test_slides_of_unequal_lengths_are_those_alone(small, global_pool):
    encoder = gigapath_slide_encoder(small, **SMALL, max_wsi_size=9000, global_pool=global_pool)
    x, coords = torch.randn(2, 50, 1536), torch.cat([places(50, 64), places(50, 50)])
    with torch.no_grad():
        both = encoder(x, coords, lengths=[50, 33], all_layers=True)
        for item, length in enumerate((50, 33)):
            part = slice(item, item + 1)
            alone = encoder(x[part, :length], coords[part, :length], all_layers=True)
            for packed, single in zip(both, alone, strict=True):
                torch.testing.assert_close(packed[part], single, atol=1e-5, rtol=1e-5)
        (last,) = encoder(x, coords, lengths=torch.tensor([50, 33]))
    assert len(both) == 4
    assert not torch.allclose(last, both[-1], atol=1e-2)  # it passes encoder.layer_norm too


def test_segments_follow_from_the_largest_slide():
    assert slide_segments(262144, 256) == (1024, 5792, 32768, 185363, 1048576)
    assert slide_segments(524288, 512) == slide_segments(262144, 256)  # the same slide in pixels of half the size
    assert slide_segments(250000, 256) == (1024, 4870, 23170, 110217, 524288)
    with pytest.raises(ConfigError, match="at least tile_size"):
        slide_segments(100, 256)


def test_places_that_coincide_are_counted(small):
    encoder = gigapath_slide_encoder(small, **SMALL)
    coords = places(20, 64)
    coords[0, 3] = coords[0, 4] + 100  # the same tile, other pixels
    with pytest.warns(UserWarning, match="1 of 20 coordinates"):
        encoder(torch.randn(1, 20, 1536), coords)


def test_files_weights_back_and_faults(small, tmp_path):
    torch.save({"model": {f"module.{key}": x for key, x in small.items()}}, tmp_path / "slide_encoder.pth")
    encoder = gigapath_slide_encoder(tmp_path / "slide_encoder.pth", **SMALL)
    back = to_gigapath(encoder.encoder)
    assert back.keys() == small.keys()
    assert all(torch.equal(back[key], small[key]) for key in small)
    with pytest.raises(
        CheckpointError, match=r"encoder.layers.2.ffn.fc1.weight is unknown(.|\n)*norm.weight has shape"
    ):
        gigapath_slide_encoder(small | {"norm.weight": torch.zeros(3)}, **{**SMALL, "depth": 2})
    torch.save(SlideEncoder, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="nothing else is read"):
        gigapath_slide_encoder(tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="cannot read"):
        gigapath_slide_encoder(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        gigapath_slide_encoder({"epoch": 3})


@pytest.mark.parametrize("given", [{}, {"dim": 256}, {"depth": 3, "mlp_ratio": 2}])
def test_sizes_that_are_not_given_are_those_of_the_weights(small, given, caplog):
    log_once.cache_clear()
    config = gigapath_slide_encoder(small, **given).encoder.config
    assert (config.layers, config.dim, config.inner_dim, config.heads) == (3, 256, 512, 16)
    assert "weights do not show the number of heads, so dim 256 gets 16; give heads" in caplog.text


def test_a_size_that_is_given_is_not_taken_from_the_weights(small, caplog):
    log_once.cache_clear()
    gigapath_slide_encoder(small)
    assert "the weights have 3 layers; give depth" in caplog.text
    with pytest.raises(CheckpointError, match=r"depth is 3.*but 12 is asked for(.|\n)*layers.10.*is missing"):
        gigapath_slide_encoder(small, depth=12)


def test_settings_beside_a_folder_are_refused(small, tmp_path):
    encoder = gigapath_slide_encoder(small, dropout=0.1)
    save_pretrained(encoder.encoder, tmp_path / "folder")
    assert gigapath_slide_encoder(tmp_path / "folder").encoder.config == encoder.encoder.config
    with pytest.raises(ConfigError, match=r"its own settings, but heads, tile_size, dropout is given; leave it out"):
        gigapath_slide_encoder(tmp_path / "folder", heads=16, tile_size=512, dropout=0.1)


def test_many_faults_are_one_short_message(small):
    with pytest.raises(CheckpointError) as caught:
        gigapath_slide_encoder(small, dim=384, depth=5, mlp_ratio=2)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert lines[1:4] == [
        "depth is 3 in the weights, but 5 is asked for",
        "mlp_ratio * dim is 512 in the weights, but 768 is asked for",
        "dim is 256 in the weights, but 384 is asked for",
    ]
    assert lines[5].endswith("is missing, and 38 more keys")
    with pytest.raises(CheckpointError, match=r"cls_token is missing$"):
        gigapath_slide_encoder({key: x for key, x in small.items() if key != "cls_token"})
