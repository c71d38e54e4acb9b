"""Every experiment runs at its smoke size: trainings, measurements, table, picture, and nothing twice."""

import json
from pathlib import Path

import pytest

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError
from longnet_dist.experiments import experiment_names
from longnet_dist.experiments.kinds import KINDS, over_seeds, retrieval_tasks
from longnet_dist.experiments.plan import Experiment, RunPlan, runs_of
from longnet_dist.experiments.runner import is_finished, run_all
from longnet_dist.inference.retrieval import Retrieval, evaluate_retrieval
from tests.experiments import forked
from tests.train.runs import write_corpus


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    write_corpus(folder / "text.tokens")
    return folder


def run_smoke(name, output):
    experiment = Experiment.read(name, smoke=True)
    runs = list(runs_of(experiment, (), output, data=output / "text.tokens", vocab_size=256))
    run_all(runs, forked.train, LaunchEnvironment())
    return experiment, runs


@pytest.mark.parametrize("name", experiment_names())
def test_an_experiment_runs_and_is_not_run_again(output, name):
    experiment, runs = run_smoke(name, output)
    folder = experiment.folder(output)
    document = json.loads((folder / f"{name}.json").read_text())
    assert [record["run"] for record in document["records"]] == [run.name for run in runs]
    assert (document["smoke"], document["title"]) == (True, experiment.title)
    page = (folder / f"{name}.md").read_text()
    assert page.startswith(f"# {experiment.title}\n")
    assert f"longnet experiment {name} --smoke" in page
    cells = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(cells)) == 1
    assert len(cells) >= 2 + len(experiment.runs)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path.home()) not in (folder / f"{name}.json").read_text()
    run_all(runs, forked.never, LaunchEnvironment())
    changed = next(runs_of(experiment, (), output, overrides=["model.heads=1"], vocab_size=256))
    with pytest.raises(ConfigError, match=r"is the result of other settings: config\.model\.heads is 1, and was \d+;"):
        is_finished(changed)


def test_measures_are_those_of_their_runs(output):
    """Runs of the test above are not made again."""
    found = {}
    for name in ("context", "adapt", "prompt", "retrieval", "distance"):
        run_smoke(name, output)
        document = json.loads((output / f"{name}-smoke" / f"{name}.json").read_text())
        found[name] = {record["run"]: record for record in document["records"]}
    full = found["context"]["full-2k"]
    assert full["tokens"] == 2 * 2 * 128
    assert full["attention"] == "full"
    assert set(full["measured"]["points"][0]["contexts"]) == {"128", "256"}
    assert full["data"]["tokens"] > 1000
    points = found["adapt"]["dilated"]["measured"]["points"]
    assert [point["tokens"] for point in points] == [0, 64, 128]
    last_of_full = found["adapt"]["full"]["measured"]["points"][-1]["contexts"]["64"]["loss"]
    losses = [point["contexts"]["64"]["loss"] for point in points]
    assert losses[0] != last_of_full  # the same weights, dilated
    assert losses[0] == pytest.approx(last_of_full, abs=0.5)
    assert len(set(losses)) == 3
    positions = found["prompt"]["dilated-32k"]["measured"]["positions"]
    assert [part[:2] for part in positions] == [[0, 64], [64, 128], [128, 256]]
    window = found["retrieval"]["window"]["measured"]["results"]
    assert {result["length"] for result in window} == {256}
    assert len(found["retrieval"]["dilated"]["measured"]["results"]) == 2 * 2 * 2
    assert found["distance"]["paper"]["measured"]["points"][0]["worst"] == 1


def test_an_interrupted_measurement_goes_on(output, monkeypatch):
    _, runs = run_smoke("retrieval", output)
    kind, measured = KINDS["retrieval_tasks"], json.loads(runs[0].record.read_text())["measured"]
    calls = []

    def interrupted(model, *place):
        calls.append(place)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate_retrieval(model, *place)

    monkeypatch.setattr(retrieval_tasks, "evaluate_retrieval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kind.measure(runs[0], LaunchEnvironment())
    assert kind.measure(runs[0], LaunchEnvironment()) == measured
    assert len(calls) == len(measured["results"]) + 1
    assert calls[3] == calls[4]


@pytest.mark.parametrize(("changed", "kept"), [((), 2), (("train.steps=1",), 0)], ids=["same", "other"])
def test_an_interrupted_measurement_goes_on_with_the_same_training_only(tmp_path, monkeypatch, changed, kept):
    experiment, places = Experiment.read("retrieval", smoke=True), []
    before, after = (next(runs_of(experiment, (), tmp_path, overrides=words)) for words in ((), changed))

    def interrupted(model, task, length, depth, samples, *_):
        places.append((task, length, depth))
        if len(places) == 3:
            raise KeyboardInterrupt
        return Retrieval(task, length, depth, samples, samples, 1.0)

    monkeypatch.setattr(retrieval_tasks, "measure_run", lambda *given: given[-1](None, None, None))
    monkeypatch.setattr(retrieval_tasks, "evaluate_retrieval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KINDS["retrieval_tasks"].measure(before, LaunchEnvironment())
    results = KINDS["retrieval_tasks"].measure(after, LaunchEnvironment())["results"]
    assert len(places) == 3 + len(results) - kept


def test_full_sizes_are_valid_configurations(tmp_path):
    """Each run's model, batch and checkpoints fit; those of text get the ids of a BPE."""
    for name in experiment_names():
        experiment = Experiment.read(name)
        assert KINDS[experiment.kind]
        for run in runs_of(experiment, (), tmp_path, vocab_size=None if name == "retrieval" else 16384):
            if not KINDS[experiment.kind].trains:
                continue
            config = run.config()
            step = config.train.batch_size * config.data.sequence_length
            assert step >= 2**18 or name == "retrieval"
            assert all(tokens % step == 0 for tokens in run.settings.get("checkpoints", ()))
            assert all(
                tokens // step % config.train.checkpoint_every == 0 for tokens in run.settings.get("checkpoints", ())
            )


def test_a_run_may_be_the_training_of_another_experiment(tmp_path):
    (ours,) = runs_of(Experiment.read("prompt"), ["full-2k"], tmp_path)
    theirs, second = runs_of(Experiment.read("context"), ["full-2k"], tmp_path)
    assert (ours.folder, ours.values) == (theirs.folder, theirs.values)
    assert ours.record != theirs.record
    assert ours.settings != theirs.settings
    assert [run.key for run in runs_of(Experiment.read("context"), ["full-2k-seed1"], tmp_path)] == [second.key]
    (adapted,) = runs_of(Experiment.read("adapt"), ["dilated"], tmp_path)
    (full,) = runs_of(Experiment.read("compute"), ["full-8k"], tmp_path)
    assert adapted.init_folder == full.folder
    experiment = Experiment.read("prompt")
    for plan in (RunPlan(trained="context/none"), RunPlan(trained="context/full-2k", model={"dim": 8})):
        with pytest.raises(ConfigError, match="must be a run of that experiment, and has no sections of its own"):
            list(runs_of(experiment.model_copy(update={"runs": {"a": plan}}), (), tmp_path))


def test_only_the_settings_that_changed_are_named(tmp_path):
    experiment = Experiment.read("distance", smoke=True)
    (run,) = runs_of(experiment, ["paper"], tmp_path)
    assert run_all([run], forked.never, LaunchEnvironment())
    (changed,) = runs_of(experiment, ["paper"], tmp_path, overrides=["model.kv_heads=4"])
    with pytest.raises(
        ConfigError, match=r"other settings: config\.model\.kv_heads is 4, and was not set; use another"
    ):
        is_finished(changed)


def test_a_spread_is_a_plain_number():
    assert str(over_seeds([150.0, 270.0])) == "210 ± 80"
    assert str(over_seeds([3.01, 3.04])) == "3.025 ± 0.02"
    assert str(over_seeds([2.5])) == "2.5"


def test_nothing_begins_when_it_is_late(tmp_path):
    experiment = Experiment.read("distance", smoke=True)
    runs = list(runs_of(experiment, (), tmp_path))
    answers = iter([False, False, True])
    assert not run_all(runs, forked.never, LaunchEnvironment(), lambda: next(answers))
    assert [is_finished(run) for run in runs] == [True, False]
    assert run_all(runs, forked.never, LaunchEnvironment(), lambda: False)


def test_no_training_begins_when_its_preparation_took_the_time(tmp_path, monkeypatch):
    runs, prepared = list(runs_of(Experiment.read("retrieval", smoke=True), (), tmp_path)), []
    monkeypatch.setattr(KINDS["retrieval_tasks"], "prepare", staticmethod(prepared.append))
    assert not run_all(runs, forked.never, LaunchEnvironment(), lambda: bool(prepared))
    assert prepared == runs[:1]


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no experiment 'contxt': use one of .*; the nearest is context"):
        Experiment.read("contxt")
    experiment = Experiment.read("context", smoke=True)
    with pytest.raises(ConfigError, match="has no run 'dense'; it has full-2k"):
        list(runs_of(experiment, ("dense",), tmp_path))
    bad = experiment.model_copy(update={"settings": {"contexts": [64], "tokns": 3}})
    with pytest.raises(ConfigError, match=r"tokens: Field required; tokns: Extra inputs"):
        KINDS["perplexity"].table(bad, [{"run": "a", "settings": bad.settings}])
