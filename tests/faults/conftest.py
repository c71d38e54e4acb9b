import pytest

from tests.train.runs import write_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "source.tokens")


@pytest.fixture
def config(tmp_path, corpus):
    """A configuration file whose run goes to ``tmp_path / "run"``."""
    return write_config(tmp_path, "run", corpus)
