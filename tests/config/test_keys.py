"""The list of keys is complete and states the defaults."""

import yaml

from longnet_dist.config.keys import key_lines, keys
from longnet_dist.config.loading import known_keys, load_config
from longnet_dist.config.packaged import find_config
from longnet_dist.config.schema import Config


def test_every_key_of_the_schema_is_listed_with_its_meaning():
    table = list(keys())
    assert [key.name for key in table if key.name != "model.name"] == list(known_keys(Config))
    assert "model.name" in {key.name for key in table}
    for key in table:
        assert key.meaning, f"{key.name} is not described in the docstring of its section"
        assert "\n" not in key.meaning


def test_defaults_are_what_a_configuration_gets():
    config = load_config(find_config("paper"))
    values = config.model_dump(mode="json")
    given = yaml.safe_load(find_config("paper").read_text())
    compared = 0
    for key in keys():
        section, _, name = key.name.partition(".")
        if "." in name or section == "model" or name in given.get(section, {}):
            continue
        assert yaml.safe_load(key.default) == values[section][name], key
        compared += 1
    assert compared > 30


def test_required_keys_say_so():
    assert {key.name for key in keys() if key.default == "required"} == {
        "model.dim",
        "model.layers",
        "model.heads",
        "model.segment_lengths",
        "model.dilation_rates",
        "train.output_dir",
        "train.steps",
    }


def test_a_line_is_name_default_and_meaning():
    for line, key in zip(key_lines(), keys(), strict=True):
        assert line.split() == [*key.name.split(), *key.default.split(), *key.meaning.split()]
