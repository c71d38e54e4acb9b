import pytest

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import CheckpointError, ConfigError, DataError
from longnet_dist.inference.generation import Sampling
from longnet_dist.inference.runs import continue_text, evaluate_run
from longnet_dist.telemetry.json_lines import read_jsonl
from tests.train.runs import run, tiny_config

ALONE = LaunchEnvironment()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(2, tiny_config(folder, corpus, "train.validate_every=2", "train.checkpoint_every=2"))
    return folder


def test_evaluation_of_a_run_is_its_own_validation(trained, corpus):
    results = evaluate_run(trained, corpus, [64, 16], 10**6, "validation", ALONE)
    last = read_jsonl(trained / "validation.jsonl")[-1]
    assert list(results) == [64, 16]
    # the run shares windows over two ranks, so it may have left one row out
    assert results[64].loss == pytest.approx(last["loss"], rel=1e-4)
    assert results[16].tokens == results[64].tokens
    assert results[16].loss != results[64].loss


def test_an_earlier_checkpoint_can_be_named(trained, corpus):
    early = evaluate_run(trained / "checkpoints" / "step_00000002", corpus, [64], 10**6, "validation", ALONE)
    assert early[64].loss == pytest.approx(read_jsonl(trained / "validation.jsonl")[0]["loss"], rel=1e-4)


def test_a_text_is_continued(trained):
    texts = continue_text(trained, "def ", 10, Sampling(), samples=3)
    assert len(set(texts)) == 3
    assert all(text.startswith("def ") for text in texts)
    assert texts == continue_text(trained, "def ", 10, Sampling(), samples=3)


@pytest.mark.parametrize(("num_tokens", "samples"), [(2**49, 1), (-1, 1), (5, 0)])
def test_nothing_is_shown_of_what_is_refused(trained, num_tokens, samples):
    shown = []
    with pytest.raises(ConfigError, match=r"number of tokens to add must be|at least 1 sample"):
        continue_text(trained, "def ", num_tokens, Sampling(), samples, show=shown.append)
    assert shown == []


@pytest.mark.parametrize(("contexts", "num_tokens"), [([0], 5), ([4, -1], 5), ([4], 0)])
def test_lengths_must_be_positive(trained, corpus, contexts, num_tokens):
    with pytest.raises(ConfigError, match="must be at least 1"):
        evaluate_run(trained, corpus, contexts, num_tokens, "validation", ALONE)


def test_text_of_another_tokenizer_is_refused(trained, corpus, monkeypatch):
    class Other(ByteTokenizer):
        name = "other"

        def to_json(self):
            return {"kind": "other"}

    monkeypatch.setattr(RunFolder, "tokenizer", lambda self: Other())
    with pytest.raises(DataError, match=r"another tokenizer \(bytes\) than the run's \(other\)"):
        evaluate_run(trained, corpus, [8], 10, "validation", ALONE)


def test_a_folder_without_a_run_is_refused(tmp_path, corpus):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        evaluate_run(tmp_path, corpus, [8], 10, "validation", ALONE)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        continue_text(tmp_path, "def ", 1, Sampling())
