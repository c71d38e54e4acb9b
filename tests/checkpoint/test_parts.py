"""Checkpoints that every rank has written a part of."""

import errno
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from longnet_dist.checkpoint import writer as checkpoint_writer
from longnet_dist.checkpoint import writing_ranks
from longnet_dist.checkpoint.format import (
    Progress,
    checkpoint_folder,
    checkpoints,
    load_weights,
    parse_state,
    read_state,
    saved_tensors,
    state_names,
    tensor_files,
)
from longnet_dist.checkpoint.initial_weights import InitialWeights
from longnet_dist.checkpoint.parts import SavedTensors, file_name, files_of, num_parts, piece_name
from longnet_dist.checkpoint.writer import CheckpointWriter, take_snapshot, write_checkpoint
from longnet_dist.checkpoint.writing_ranks import WritingRanks
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.inference.generation import Sampling
from longnet_dist.inference.runs import continue_text, export_run
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.pretrained import from_pretrained
from tests.distributed import run_distributed
from tests.faults.ranks import Ranks, wait_until
from tests.train.runs import make_trainer, run, tiny_config, write_config

PARTS = "train.checkpoint_parts=ranks"
MODEL = LongNetConfig(name="tiny")


def whole_tensors(folder, kind):
    saved = saved_tensors(folder, kind)
    return {name: saved.read(name).view(shape) for name, shape in saved.shapes.items()}


def both_snapshots(config):
    """What this rank holds, with what rank 0 gathers, after two steps; and the collectives that the parts took."""
    trainer = make_trainer(config)
    for step in range(2):
        trainer._train_step(step, 1e-2)
    optimizer = config.train.optimizer
    expected = take_snapshot(trainer.engine, optimizer=optimizer)
    called = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "gather", "barrier"):
            patch.setattr(dist, name, lambda *_, **__: called.append("collective"))
        parts = take_snapshot(trainer.engine, optimizer=optimizer, in_parts=True)
    return expected, parts, called


@pytest.mark.parametrize(
    ("stage", "ranks", "settings"),
    [
        *((stage, 3, ("model.dim=30", "model.positions=none", "train.batch_size=3")) for stage in range(4)),
        *((stage, 2, ("train.precision=bf16",)) for stage in (1, 2, 3)),
        (2, 2, ("deepspeed.offload_optimizer=true", "train.precision=bf16")),
        (0, 2, ("train.optimizer=adafactor", "train.adam_eps=1e-8")),
        (2, 2, ("train.optimizer=muon",)),
        (3, 2, ("train.optimizer=muon",)),
    ],
    ids=str,
)
def test_the_parts_of_all_ranks_are_what_rank_0_would_gather(tmp_path, corpus, stage, ranks, settings):
    data = (f"parallel.data={ranks}",) if "train.batch_size=3" in settings else ()
    config = tiny_config(tmp_path / "run", corpus, f"deepspeed.zero_stage={stage}", *settings, *data)
    results = run_distributed(both_snapshots, ranks, config)
    expected, total = results[0][0], 0
    for _, parts, called in results:
        assert called == []
        for name, tensors in parts.items():
            save_file(tensors, tmp_path / name)
            total += sum(tensor.numel() for tensor in tensors.values())
    assert total == sum(tensor.numel() for tensors in expected.values() for tensor in tensors.values())
    for kind in ("model", *state_names(config.train.optimizer)):
        names = [file_name(kind, rank, ranks) for rank in range(ranks)]
        saved = SavedTensors([tmp_path / name for name in names])
        whole = expected[f"{kind}.safetensors"]
        assert saved.shapes.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(saved.read(name).view(saved.shapes[name]), tensor), (kind, name)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (2, 1)), ((2, 3), (2, 3)), ((2, 0), (1, 1)), ((3, 1), (2, 3)), ((4, 3), (3, 2)), ((3, 2), (4, 0))],
    ids=str,
)
def test_a_run_goes_on_from_parts_as_from_whole_tensors_on_any_layout(tmp_path, corpus, before, after):
    settings = ("train.steps=6", "train.checkpoint_every=3", "model.dim=30", "model.positions=none")
    for name, how in (("whole", "one"), ("parts", "ranks")):
        options = (*settings, f"train.checkpoint_parts={how}", f"deepspeed.zero_stage={before[1]}")
        run(before[0], tiny_config(tmp_path / name, corpus, *options))
        shutil.rmtree(checkpoint_folder(tmp_path / name, 6))
        run(after[0], tiny_config(tmp_path / name, corpus, *settings, f"deepspeed.zero_stage={after[1]}"))
    assert num_parts(parse_state(checkpoint_folder(tmp_path / "parts", 3)).sha256) == before[0]
    assert num_parts(parse_state(checkpoint_folder(tmp_path / "parts", 6)).sha256) == 1
    for name in tensor_files():
        tensors, others = (load_file(checkpoint_folder(tmp_path / run, 6) / name) for run in ("whole", "parts"))
        assert all(torch.equal(tensors[key], others[key]) for key in tensors), name
    assert parse_state(checkpoint_folder(tmp_path / "parts", 3)).identity is not None


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    config = tiny_config(tmp_path_factory.mktemp("parts") / "run", corpus, "train.steps=3", PARTS, "train.keep_last=0")
    run(
        3, config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 3, "checkpoint_every": 1})})
    )
    return config


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(trained.train.output_dir, tmp_path / "run")
    return checkpoint_folder(tmp_path / "run", 3)


def test_the_index_has_the_checksums_of_all_parts(checkpoint):
    state = read_state(checkpoint, LongNetConfig(**parse_state(checkpoint).model))
    files = {path.name for path in checkpoint.iterdir()} - {"state.json"}
    assert state.sha256.keys() == files == set(tensor_files(parts=3))
    assert state.format == 2
    assert files_of(files, "model") == [f"model.0000{rank}-of-00003.safetensors" for rank in range(3)]
    sizes = [(checkpoint / name).stat().st_size for name in files_of(files, "exp_avg")]
    assert max(sizes) < 1.1 * min(sizes)


def test_what_reads_checkpoints_reads_parts(trained, checkpoint, tmp_path):
    model = LongNet(trained.model)
    load_weights(checkpoint, model)
    export_run(checkpoint, tmp_path / "exported", "fp32")
    exported = from_pretrained(tmp_path / "exported")
    for (name, weight), other in zip(model.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(weight, other), name
    (text,) = continue_text(checkpoint.parent.parent, "def ", 3, Sampling(seed=1))
    assert text.startswith("def ")
    init = InitialWeights.find(checkpoint, trained.model)
    assert init.sha256 == parse_state(checkpoint).weights_sha256
    assert init.sha256 != InitialWeights.find(checkpoint_folder(checkpoint.parents[1], 2), trained.model).sha256


def cut(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])


def swap_with_older(checkpoint, name):
    shutil.copy(checkpoint_folder(checkpoint.parents[1], 2) / name, checkpoint / name)


@pytest.mark.parametrize("damage", [cut, swap_with_older, lambda checkpoint, name: (checkpoint / name).unlink()])
@pytest.mark.parametrize("kind", ["model", "exp_avg_sq"])
def test_a_damaged_part_is_passed_over_for_the_checkpoint_before(trained, checkpoint, corpus, damage, kind, capfd):
    damage(checkpoint, f"{kind}.00001-of-00003.safetensors")
    folder = checkpoint.parents[1]
    run(2, tiny_config(folder, corpus, "train.steps=3", "train.checkpoint_every=1", "train.keep_last=0"))
    told = capfd.readouterr().err
    assert f"{kind}.00001-of-00003.safetensors is missing or damaged" in told
    assert (folder / "checkpoints" / "damaged_0_step_00000003").is_dir()
    assert num_parts(read_state(checkpoint_folder(folder, 3)).sha256) == 1


def test_a_part_that_the_index_does_not_have_is_missing(checkpoint):
    fields = json.loads((checkpoint / "state.json").read_text())
    del fields["sha256"]["model.00002-of-00003.safetensors"]
    (checkpoint / "state.json").write_text(json.dumps(fields | {"digest": None}))
    with pytest.raises(CheckpointError, match=r"model\.00002-of-00003\.safetensors is missing"):
        read_state(checkpoint)
    (checkpoint / "state.json").write_text(json.dumps(fields | {"digest": None, "format": 1}))
    with pytest.raises(CheckpointError, match="has format 1, and this version reads 1, and 2 in parts"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 4), (4, 6)], None),
        ([(0, 4), (5, 6)], "not the whole tensor"),
        ([(0, 4), (3, 6)], "not the whole tensor"),
        ([(0, 4)], "not the whole tensor"),
        ([(1, 6)], "not the whole tensor"),
    ],
    ids=str,
)
def test_pieces_make_up_the_tensor(tmp_path, pieces, message):
    whole, files = torch.arange(6.0), []
    for number, (first, last) in enumerate(pieces):
        files.append(tmp_path / file_name("model", number, len(pieces)))
        save_file({piece_name("weight", first, (2, 3)): whole[first:last]}, files[-1])
    if message:
        with pytest.raises(CheckpointError, match=message):
            SavedTensors(files)
        return
    saved = SavedTensors(files)
    assert saved.shapes == {"weight": (2, 3)}
    for first in range(7):
        for last in range(first, 7):
            assert torch.equal(saved.read("weight", first, last), whole[first:last])
    with pytest.raises(CheckpointError, match=r"the shape of weight is \[2, 3\] there and \[3, 2\] here"):
        saved.check({"weight": torch.Size((3, 2))})


def write_with_a_fault(config, faulty, times, last):
    """Rank ``faulty`` cannot write its part the first ``times`` times; what each rank says, and what is left."""
    save, tries = checkpoint_writer.save_file, []

    def failing(tensors, file):
        if file.name.startswith("model") and dist.get_rank() == faulty:
            tries.append(file)
            if len(tries) <= times:
                raise OSError(28, "No space left on device", str(file))
        save(tensors, file)

    checkpoint_writer.save_file, checkpoint_writer.RETRY_SECONDS = failing, 0.01
    trainer, said = make_trainer(config), None
    writer = CheckpointWriter(config.train.output_dir, config.train, config.model, timeout_seconds=60)
    try:
        with writer:
            for step in (1, 2):
                writer.save(trainer.engine, Progress(step=step, tokens=step, skipped=step), last and step == 2)
                writer.finish()
    except CheckpointError as error:
        said = str(error)
    dist.barrier()
    return said, [folder.name[-1] for folder in checkpoints(config.train.output_dir)], writer._failures


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize(
    ("times", "last", "left", "failures"), [(1, False, ["2"], 0), (2, False, [], 2), (2, True, ["2"], 0)]
)
def test_a_part_that_cannot_be_written_fails_the_whole_checkpoint(
    tmp_path, corpus, faulty, times, last, left, failures, capfd
):
    config = tiny_config(tmp_path / "run", corpus, PARTS)
    for said, found, counted in run_distributed(write_with_a_fault, 2, config, faulty, times, last):
        assert (said, found, counted) == (None, left, failures)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "cannot write" in line]
    assert len(warnings) == times
    assert all(f"rank {faulty} on host" in line and "No space left on device" in line for line in warnings)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("faulty", [0, 1])
def test_one_failure_too_many_is_told_by_rank_0(tmp_path, corpus, faulty):
    config = tiny_config(tmp_path / "run", corpus, PARTS, "train.checkpoint_failures=3")
    first, other = run_distributed(write_with_a_fault, 2, config, faulty, 99, True)
    assert "that is failure 3 in a row" in first[0]
    assert f"rank {faulty} on host" in first[0]
    assert other == (None, [], 3)


def ranks_of_one_store(size, timeout_seconds):
    """A store, and the ranks that tell each other through it in one process."""
    store = dist.HashStore()
    shared = type("Shared", (), {"clone": lambda self: store})()
    return store, [WritingRanks(shared, rank, size, timeout_seconds) for rank in range(size)]


def test_a_rank_that_writes_nothing_is_a_failure_after_the_time_out(tmp_path):
    _, (ranks, _) = ranks_of_one_store(2, 0.2)
    with pytest.raises(OSError, match=r"no answer \(part/1\)"):
        write_checkpoint(checkpoint_folder(tmp_path, 1), {}, MODEL, Progress(step=1, tokens=1), ranks=ranks)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_part_that_fails_early_waits_for_the_parts_of_all_ranks(monkeypatch):
    store, (first, second, third) = ranks_of_one_store(3, 60)
    for ranks in (first, second, third):
        ranks.begin()
        ranks.say_part(dict)
    first.checksums()
    for ranks in (first, second, third):
        ranks.begin()

    def full():
        raise OSError("full")

    first.say_part(dict)
    second.say_part(full)
    monkeypatch.setattr(first._given_up, "wait", lambda _: third.say_part(dict))
    with pytest.raises(OSError, match=r"rank 1 on host .*: full"):
        first.checksums()
    assert store.check(["checkpoint/2/part/2"])
    assert not store.check(["checkpoint/1/part/2"]), "all have heard the end of the first round"


def test_the_waits_for_ranks_do_not_add_up(monkeypatch):
    _, (first, second, _) = ranks_of_one_store(3, 10)
    clock = SimpleNamespace(seconds=0)
    clock.monotonic = lambda: clock.seconds

    def wait(_):
        clock.seconds += 1
        if clock.seconds == 8:
            second.say_part(dict)

    monkeypatch.setattr(writing_ranks, "time", clock)
    monkeypatch.setattr(first._given_up, "wait", wait)
    for ranks in (first, second):
        ranks.begin()
    first.say_part(dict)
    with pytest.raises(OSError, match=r"no answer \(part/2\) for more than 10 s"):
        first.checksums()
    assert clock.seconds == 11


def test_rounds_are_forgotten(tmp_path):
    store, both = ranks_of_one_store(2, 60)
    for step in range(1, 6):
        arguments = (checkpoint_folder(tmp_path, step), {}, MODEL, Progress(step=step, tokens=1), None, "adamw")
        thread = threading.Thread(target=write_checkpoint, args=(*arguments, both[1]))
        thread.start()
        write_checkpoint(*arguments, both[0])
        thread.join()
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == list("12345")
    assert store.num_keys() <= 2 * 4 + 1


def test_a_name_that_does_not_reach_the_disk_fails_the_checkpoint_on_all_ranks(tmp_path, monkeypatch):
    flush, fails = checkpoint_writer._flush, True

    def flush_or_fail(path):
        if path.name == "checkpoints" and fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        flush(path)

    monkeypatch.setattr(checkpoint_writer, "_flush", flush_or_fail)
    _, both = ranks_of_one_store(2, 60)
    arguments = (checkpoint_folder(tmp_path, 1), {}, MODEL, Progress(step=1, tokens=1), None, "adamw")
    with ThreadPoolExecutor(2) as threads:
        errors = [threads.submit(write_checkpoint, *arguments, ranks).exception for ranks in both]
    assert ["Input/output error" in str(error()) for error in errors] == [True, True]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    fails = False
    with ThreadPoolExecutor(2) as threads:
        errors = [threads.submit(write_checkpoint, *arguments, ranks).exception for ranks in both]
    assert [error() for error in errors] == [None, None]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_rank_that_is_rounds_behind_hears_how_they_ended(tmp_path):
    _, (ahead, behind) = ranks_of_one_store(2, 5)

    def fails():
        raise OSError("full")

    for _ in range(4):  # rank 0 gives up round after round at once
        ahead.begin()
        with pytest.raises(OSError, match="full"):
            ahead.told("folder", fails)
    for _ in range(4):
        behind.begin()
        with pytest.raises(OSError, match="full"):
            behind.told("folder", fails)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_in_a_checkpoint_leaves_the_one_before(tmp_path, corpus, killed):
    config = write_config(tmp_path, "run", corpus)
    settings = (PARTS, "train.checkpoint_every=1", "train.keep_last=0")
    with Ranks(tmp_path / "logs", 2, config, "train.steps=1000", *settings) as ranks:
        wait_until(lambda: len(checkpoints(tmp_path / "run")) >= 2, "two checkpoints")
        wait_until(lambda: list((tmp_path / "run" / "checkpoints").glob(".step_*/*")), "a part", every=0.0)
        os.kill(ranks.pids[killed], signal.SIGKILL)
        status = ranks.wait()
        assert (status[killed], status[1 - killed]) == (-9, 69)
    whole = checkpoints(tmp_path / "run")
    for folder in whole:
        read_state(folder)
    steps = f"train.steps={len(whole) + 2}"
    with Ranks(tmp_path / "logs", 2, config, steps, *settings) as ranks:
        assert ranks.wait() == [0, 0]
    assert len(checkpoints(tmp_path / "run")) == len(whole) + 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_small_checkpoints_are_whole_unless_asked(tmp_path, corpus):
    train = tiny_config(tmp_path / "run", corpus).train
    assert not train.writes_parts(2**30 - 1, 8)
    assert train.writes_parts(2**30, 8)
    assert not train.writes_parts(2**40, 1)
    one, ranks = (train.model_copy(update={"checkpoint_parts": parts}) for parts in ("one", "ranks"))
    assert not one.writes_parts(2**40, 8)
    assert ranks.writes_parts(1, 2)
    assert not ranks.writes_parts(2**40, 1)
