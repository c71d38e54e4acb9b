import subprocess
import sys

import pytest

import longnet_dist


@pytest.mark.parametrize("name", longnet_dist.__all__)
def test_public_names_are_there(name):
    assert getattr(longnet_dist, name).__name__ == name


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'LongNets'"):
        longnet_dist.LongNets  # noqa: B018


def test_geometry_and_configuration_need_no_torch():
    code = "import sys; from longnet_dist import DilatedPattern, LongNetConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
