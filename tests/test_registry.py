import sys
from importlib import import_module

import pytest

from longnet_dist.errors import ConfigError
from longnet_dist.registry import Registry

FRUIT = """\
from {package} import FRUITS

@FRUITS.register("{name}")
class Fruit:
    name = "{name}"
"""


@pytest.fixture
def fruits(tmp_path, monkeypatch):
    """A registry whose folder has two files."""
    folder = tmp_path / "fruits"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        'from longnet_dist.registry import Registry\nFRUITS = Registry("fruit", __name__)\n'
    )
    for name in ("apple", "pear"):
        (folder / f"{name}.py").write_text(FRUIT.format(package="fruits", name=name))
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("fruits").FRUITS
    for name in [name for name in sys.modules if name.partition(".")[0] == "fruits"]:
        del sys.modules[name]


def test_a_file_is_known_by_its_name_and_imported_when_it_is_needed(fruits):
    assert fruits.names() == ("apple", "pear")
    assert "fruits.apple" not in sys.modules
    assert fruits["apple"].name == "apple"
    assert "fruits.apple" in sys.modules
    assert "fruits.pear" not in sys.modules


def test_code_elsewhere_registers_by_being_imported(fruits, tmp_path):
    (tmp_path / "orchard.py").write_text(FRUIT.format(package="fruits", name="quince"))
    import_module("orchard")
    assert fruits.names() == ("apple", "pear", "quince")
    assert fruits["quince"].name == "quince"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plum", "fruit must be one of apple, pear, not 'plum'$"),
        ("aple", r"not 'aple'; did you mean apple\?$"),
        (None, "not None$"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(fruits, name, message):
    with pytest.raises(ConfigError, match=message):
        fruits[name]
    with pytest.raises(ConfigError, match=r"basket\.fruit must be one of apple, pear"):
        fruits.check(name, "basket.fruit")


def test_two_implementations_cannot_have_one_name():
    registry = Registry("fruit", "longnet_dist")
    registry.register("apple")(kept := object())
    registry.register("apple")(kept)
    with pytest.raises(ConfigError, match="fruit 'apple' is registered already"):
        registry.register("apple")(object())
