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
