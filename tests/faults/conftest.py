import pytest

from tests.train.runs import write_config


@pytest.fixture
def config(tmp_path, corpus):
    """A configuration file whose run goes to ``tmp_path / "run"``."""
    return write_config(tmp_path, "run", corpus)
