"""Configurations by name."""

from pathlib import Path

import pytest

from longnet_dist.config.loading import load_config
from longnet_dist.config.packaged import find_config, run_names
from longnet_dist.errors import ConfigError
from tests.config.test_loading import TEXT


def test_a_packaged_configuration_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_names() == ["paper", "quickstart"]
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "my.yaml").write_text(TEXT)
    assert load_config(find_config("paper")).train.output_dir == Path("runs/paper")
    assert load_config(find_config("paper/my.yaml")).train.steps == 10


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("qickstart", "'qickstart': give a YAML file or one of paper, quickstart; the nearest is quickstart"),
        ("zzz", "'zzz': give a YAML file or one of paper, quickstart"),
        ("125m", "'125m': .*; 125m is a size of model: paper model.name=125m"),
        ("", "'': give a YAML file"),
    ],
)
def test_no_such_configuration(word, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"there is no configuration {message}"):
        find_config(word)
