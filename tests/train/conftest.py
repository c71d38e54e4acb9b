import pytest

from tests.train.runs import import_deepspeed, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    import_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "source.tokens")
