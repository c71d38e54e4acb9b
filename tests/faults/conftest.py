import pytest

from tests.train.runs import TINY, import_deepspeed, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    import_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "source.tokens")


@pytest.fixture
def config(tmp_path, corpus):
    """A configuration file whose run goes to ``tmp_path / "run"``."""
    file = tmp_path / "config.yaml"
    file.write_text(TINY.replace("RUN", str(tmp_path / "run")).replace("DATA", str(corpus)))
    return file
