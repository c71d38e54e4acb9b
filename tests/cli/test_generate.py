import io

import pytest

from longnet_dist.cli.generate import SEPARATOR, main
from longnet_dist.errors import ConfigError, DataError
from tests.train.runs import run, tiny_config, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    run(1, tiny_config(folder / "run", write_corpus(folder / "source.tokens")))
    return str(folder / "run")


def test_the_prompt_is_continued(folder, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        main([folder, "--prompt", "import", "--tokens", "12", "--seed", seed, "--temperature", "1", "--top-k", "0"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("import")
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_prompt_may_be_a_file_and_have_several_samples(folder, capsys, tmp_path):
    (tmp_path / "prompt").write_text("import sys\n" * 100)  # longer than any segment, and than the training sequences
    main([folder, "--prompt-file", str(tmp_path / "prompt"), "--tokens", "5", "--samples", "2"])
    texts = capsys.readouterr().out.split(f"\n{SEPARATOR}\n")
    assert len(texts) == 2
    assert all(text.startswith("import sys\n" * 100) for text in texts)
    with pytest.raises(DataError, match="cannot read the prompt file"):
        main([folder, "--prompt-file", str(tmp_path / "none")])


def test_an_empty_prompt_is_refused(folder):
    with pytest.raises(ConfigError, match="prompt is empty"):
        main([folder, "--prompt", ""])


def test_a_prompt_has_the_bytes_that_were_typed(folder, capsys, tmp_path, monkeypatch):
    """Not UTF-8: as a word of the command line, as a file, and from standard input, all the same."""
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    outputs = []
    for prompt in (["--prompt", "caf\udce9"], ["--prompt-file", str(tmp_path / "prompt")], ["--prompt-file", "-"]):
        main([folder, *prompt, "--tokens", "3", "--temperature", "0"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("caf\ufffd")
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "-1"], "must be at least 0, not -1"),
        (["--samples", "0"], "must be at least 1, not 0"),
        (["--tokens", "1e3"], "invalid natural value: '1e3'"),
    ],
)
def test_impossible_counts_are_refused(folder, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main([folder, "--prompt", "a", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], "the temperature must be 0 or from 1e-06 upwards and finite, not nan"),
        (["--temperature", "inf"], "finite, not inf"),
        (["--temperature", "1e-320"], "use 0 for the most likely token"),
        (["--temperature", "-0.5"], "must not be negative"),
        (["--seed", str(2**64)], r"the seed must be less than 2\^64, not 18446744073709551616"),
        (["--tokens", str(2**63)], r"must be from 0 to 2\^48, not 9223372036854775808"),
    ],
)
def test_impossible_values_are_refused(folder, capsys, words, message):
    with pytest.raises(ConfigError, match=message):
        main([folder, "--prompt", "a", *words])
    assert capsys.readouterr().out == ""  # not the prompt, which the message would follow on its line


def test_extreme_values_that_are_possible(folder, capsys):
    for words in (["--temperature", "1e-6"], ["--temperature", "1e30"], ["--seed", str(2**64 - 1)], ["--tokens", "0"]):
        main([folder, "--prompt", "ab", "--tokens", "2", *words])
        assert capsys.readouterr().out.startswith("ab")


def test_a_sample_ends_before_a_stop_string(folder, capsys):
    words = [folder, "--prompt", "import", "--tokens", "40", "--temperature", "1", "--top-k", "0", "--seed", "3"]
    main(words)
    whole = capsys.readouterr().out
    stop = whole[15:17]
    main([*words, "--stop", stop, "--stop", "not in the text"])
    cut = capsys.readouterr().out.removesuffix("\n")
    assert cut == whole[: whole.index(stop, len("import"))]
    main([*words, "--stop", stop, "--samples", "2"])
    texts = capsys.readouterr().out.removesuffix("\n").split(f"\n{SEPARATOR}\n")
    assert all(stop not in text.removeprefix("import") for text in texts)
