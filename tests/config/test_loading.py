from pathlib import Path

import pytest

from longnet_dist.config.loading import known_keys, load_config, parse_yaml, read_yaml
from longnet_dist.config.schema import Config
from longnet_dist.errors import ConfigError

TEXT = """\
model: {name: tiny}
train:
  output_dir: run
  steps: 10
"""


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    return path


def test_settings_replace_the_files(file):
    config = load_config(
        file,
        ["train.steps=20", "model.heads=2", "parallel.sequence=4", "train.learning_rate=6e-4", "data.path=a=b.tokens"],
    )
    assert (config.train.steps, config.model.heads, config.parallel.sequence) == (20, 2, 4)
    assert config.model.dim == 64
    assert config.train.learning_rate == 6e-4
    assert str(config.data.path) == "a=b.tokens"


def test_a_setting_may_be_a_list_or_nothing(file):
    config = load_config(file, ["model.segment_lengths=[8,16]", "model.dilation_rates=[1,2]", "data.path=null"])
    assert config.model.segment_lengths == (8, 16)
    assert config.data.path is None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.path=a #1.tokens", Path("a #1.tokens")),
        ("data.path= two words ", Path(" two words ")),
        ("data.path=1:30", Path("1:30")),
        ("data.path=010", Path("010")),
        ("data.path=2026-11-30", Path("2026-11-30")),
        ("data.path=[1, 2]", Path("[1, 2]")),
        ("data.path=lr=1e-3/a.tokens", Path("lr=1e-3/a.tokens")),
        ("data.path=null", None),
        ("data.path=~/a.tokens", Path.home() / "a.tokens"),
        ("data.path=a/~/b", Path("a/~/b")),
        ("data.cache_dir=~", Path.home()),
        ("train.output_dir=yes", Path("yes")),
        ("train.init=~/runs/x", Path.home() / "runs" / "x"),
        ("train.sample_prompt=# a: 'b' ", "# a: 'b' "),
        ("train.sample_prompt=null", "null"),
        ("train.sample_prompt=", ""),
        ("train.sample_prompt=café", "café"),
        ("train.resume=1e3", "1e3"),
        ("train.schedule=wsd", "wsd"),
        ("train.precision=bf16", "bf16"),
        ("train.steps=010", 10),
        ("train.steps=0x10", 16),
        ("train.steps=1_000", 1000),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=.5", 0.5),
        ("train.checkpoint_async=off", False),
        ("parallel.sequence=auto", "auto"),
        ("train.seed=18446744073709551615", 2**64 - 1),
    ],
)
def test_a_value_is_what_was_written(file, word, expected):
    section, _, key = word.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(file, [word]), section), key) == expected


def test_a_file_means_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT + "  seed: 010\n  init: 2026-11-30\n  sample_prompt: ~\n".replace("~", "'~'"))
    config = load_config(path)
    assert (config.train.seed, config.train.init, config.train.sample_prompt) == (10, Path("2026-11-30"), "~")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=1:30", "train.steps='1:30'"),
        ("train.steps=0o17", "train.steps='0o17'"),
        ("train.steps=2026-11-30", "train.steps='2026-11-30'"),
        ("train.seed=18446744073709551616", "train.seed=18446744073709551616 should be less than 18446744073709551616"),
        (
            "train.sample_prompt=caf\udce9",
            r"the value of train.sample_prompt must be UTF-8, but is the bytes b'caf\xe9'",
        ),
        ("data.path=\udce9", "the value of data.path must be UTF-8"),
        ("data.path=\udcc3\udca9", r"data.path is b'\xc3\xa9', which Python reads as utf-8 here; set PYTHONUTF8=1"),
        ("data.path=a\0b", "must not have a zero byte"),
        ("data.path=~nobody-here/x", "begins with a home folder that is unknown"),
        ("data.path=", "data.path is empty; give a path, or null for none"),
        ("train.output_dir=", "train.output_dir is empty; give a path"),
        ("train.init=", "train.init is empty; give a path, or null for none"),
        ("data.cache_dir=", "data.cache_dir is empty; give a path"),
        ("model.path=", "model.path is empty; give a path, or null"),
        ("train.resume=", "train.resume is empty; give a path"),
        ("train.steps=yes", "train.steps should be a number, not true; train.steps is: optimizer steps"),
        ("train.warmup_steps=off", "train.warmup_steps should be a number, not false"),
        ("train.learning_rate=true", "train.learning_rate should be a number, not true"),
        ("train.adam_betas=[0.9, on]", "train.adam_betas should be a number, not true"),
        ("train.profile={first: yes}", "train.profile.first should be a number, not true"),
        ("train.micro_batch_size=true", "train.micro_batch_size should be a number"),
        ("parallel.sequence=no", "parallel.sequence should be a number, not false"),
        ("model.layers=yes", "model.layers should be a number, not true"),
        ("model.segment_lengths=[true, 16]", "model.segment_lengths should be a number, not true"),
        ("parallel.timeout_minutes=1e300", "parallel.timeout_minutes=1e+300 should be less than or equal to 525600"),
        ("train.adam_betas=[0.9]", "train.adam_betas=[0.9] is too short; train.adam_betas is: decay rates"),
        ("train.loggers=jsonl", "train.loggers='jsonl' should be a list, such as [jsonl]"),
        ("train.profile=3", "train.profile=3 should be a section: give its keys, such as train.profile.first"),
    ],
)
def test_a_value_that_cannot_be_is_refused(file, word, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [word])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=5"], "there is no key train.stepz; the nearest is train.steps"),
        (["trian.steps=5"], "there is no key trian; the nearest is train"),
        (["train.steps=1", "train.steps=2"], "train.steps is given twice"),
        (
            ["data.sequence_length=16", "data={path: x}"],
            "data on the command line has the place of data.seq",
        ),
        (["data={path: x}", "data.sequence_length=16"], "put sequence_length into data={...}"),
        (["train.profile.first=2", "train.profile={steps: 1}"], "train.profile on the command line has the place of"),
        (["train.steps"], "must read section.key=value"),
        (["=5"], "must read section.key=value"),
        (["train.steps=[1"], "the value of train.steps is no valid YAML"),
        (["train.steps.more=5"], "steps is 10 and no section"),
        (["train=5"], "train=5"),
        (["model.headz=5"], "the nearest is 'heads'"),
    ],
)
def test_wrong_settings_are_refused(file, words, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file, words)
    assert message in str(caught.value)


def test_all_faults_are_told_at_once(file):
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.steps=0", "train.seed=-1", "data.file=x"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "the key 'train' is given twice, the second time in line 2"),
        ("train:\n  steps: 1\n  seed: 0\n  steps: 2\n", "the key 'steps' is given twice, the second time in line 4"),
        ("train: [", "no valid YAML"),
        ("- a\n- b\n", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("train: !!python/object/apply:os.getcwd []\n", "no valid YAML"),
        ("model: {name: tiny}\n", "train.output_dir and train.steps must be given"),
        ("model: {name: tiny}\ntrain: {steps: 4}\n", "train.output_dir must be given"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match=r"but .* is a folder; for a model of transformers give model\.path="):
        read_yaml(tmp_path)


def test_a_merge_key_is_no_duplicate():
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_comes_with_the_package_loads(path):
    assert load_config(path).train.output_dir == Path("runs") / path.stem


def test_known_keys_are_dotted():
    keys = set(known_keys(Config))
    assert {"model.heads", "train.resume", "deepspeed.zero_stage", "parallel.data"} <= keys
    assert "model" not in keys
