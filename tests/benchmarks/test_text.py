import pytest

from benchmarks.text import write_text
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import DataError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tree"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "one.txt").write_bytes(b"one")
    (folder / "a.txt").write_bytes(b"two!")
    (folder / "binary").write_bytes(b"\0" * 50)
    (folder / "link").symlink_to(folder / "a.txt")
    return folder


def test_text_files_in_a_fixed_order_each_once(tmp_path, folder):
    assert write_text(tmp_path / "text.tokens", 6, [folder, folder / "b"]) == 7
    assert TokenFile.open(tmp_path / "text.tokens").tokens.tobytes() == b"two!\0on"


def test_too_little_text_is_repeated_and_counted(tmp_path, folder):
    assert write_text(tmp_path / "text.tokens", 20, [folder]) == 8
    assert TokenFile.open(tmp_path / "text.tokens").tokens.tobytes() == b"two!\0one\0two!\0one\0two"


def test_no_text_is_an_error(tmp_path, folder):
    (folder / "b" / "one.txt").unlink()
    with pytest.raises(DataError, match="no text below"):
        write_text(tmp_path / "text.tokens", 20, [folder / "b"])
    assert not (tmp_path / "text.tokens").exists()
