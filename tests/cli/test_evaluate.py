import json

import pytest

from longnet_dist.checkpoint.lock import Lock
from longnet_dist.cli.evaluate import main
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import CheckpointError, ConfigError
from tests.train.runs import run, tiny_config, write_corpus


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    corpus = write_corpus(folder / "source.tokens")
    run(1, tiny_config(folder / "run", corpus))
    return str(folder / "run"), str(corpus)


def test_json_has_an_entry_for_each_context(files, capsys):
    folder, corpus = files
    main([folder, "--data", corpus, "--context", "16", "64", "--tokens", "128", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["16", "64"]
    assert list(results["64"]) == ["loss", "tokens", "perplexity", "bits_per_byte"]
    assert results["16"]["tokens"] == results["64"]["tokens"] == 128


def test_the_table_says_the_same(files, capsys):
    folder, corpus = files
    main([folder, "--data", corpus, "--context", "64", "--tokens", "128", "--json"])
    (result,) = json.loads(capsys.readouterr().out).values()
    main([folder, "--data", corpus, "--context", "64", "--tokens", "128"])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["context", "loss", "perplexity", "bits/byte", "tokens"]
    numbers = [f"{result['loss']:.4f}", f"{result['perplexity']:.3f}", f"{result['bits_per_byte']:.4f}"]
    assert line.split() == ["64", *numbers, "128"]


def test_the_whole_file_as_one_stream(files, capsys):
    folder, corpus = files
    rows = TokenFile.open(corpus).header.num_tokens - 1
    main([folder, "--data", corpus, "--stream", "--chunk", "1000", "--json"])
    ((length, streamed),) = json.loads(capsys.readouterr().out).items()
    assert int(length) == streamed["tokens"] == rows
    main([folder, "--data", corpus, "--context", str(rows), "--tokens", str(rows), "--split", "all", "--json"])
    (whole,) = json.loads(capsys.readouterr().out).values()
    assert streamed == pytest.approx(whole, rel=1e-5)
    main([folder, "--data", corpus, "--stream", "--tokens", "50", "--split", "validation"])
    assert capsys.readouterr().out.split()[-1] == "50"


def test_only_what_is_missing_is_asked_for(files, tmp_path):
    folder, corpus = files
    with pytest.raises(ConfigError, match=r"give --data TOKEN_FILE, and --context N or --stream$"):
        main([folder])
    with pytest.raises(ConfigError, match=r"give --context N or --stream$"):
        main([folder, "--data", corpus])
    with pytest.raises(ConfigError, match=r"give --data TOKEN_FILE$"):
        main([folder, "--stream"])
    with pytest.raises(CheckpointError, match=r"there is no .*nothing; give the folder of a run"):
        main([str(tmp_path / "nothing"), "--data", corpus])


def test_streams_that_cannot_be(files):
    folder, corpus = files
    with pytest.raises(ConfigError, match="positive multiple"):
        main([folder, "--data", corpus, "--stream", "--chunk", "0"])
    with pytest.raises(ConfigError, match="needs a row"):
        main([folder, "--data", corpus, "--stream", "--tokens", "0"])


def test_two_streams_do_not_share_a_state(files, tmp_path, capsys):
    run, data = files[:2]
    state = tmp_path / "state.safetensors"
    stream = [str(run), "--data", str(data), "--stream", "--chunk", "64", "--tokens", "128", "--state", str(state)]
    with (
        Lock(state.with_name(f"{state.name}.lock"), "a state"),
        pytest.raises(ConfigError, match=r"is in use by process"),
    ):
        main(stream)
    main(stream)
    assert "128" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
