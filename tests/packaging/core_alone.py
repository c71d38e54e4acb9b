"""Run the core of the package with nothing but its own requirements: attention, a model, a run's text and losses.

    python core_alone.py FOLDER          in an environment that has no extra
    python core_alone.py FOLDER --fake   hide the extras and POSIX first, in an environment that has them

It imports nothing of the tests, so that it also runs beside an installed wheel.
"""

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

ABSENT = (
    *("deepspeed", "matplotlib", "tensorboard", "triton", "flash_attn", "quack", "tokenizers", "tiktoken", "mpi4py"),
    *("transformers", "accelerate", "peft"),
)
OF_TORCH = ("triton",)  # torch itself imports it with its first optimizer, where it is installed
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
POSIX_NAMES = {
    os: (
        "fork",
        "forkpty",
        "getuid",
        "geteuid",
        "killpg",
        "sched_getaffinity",
        "setsid",
        "statvfs",
        "sysconf",
        "uname",
    ),
    signal: ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pthread_sigmask", "setitimer"),
}


def hide_extras_and_posix():
    """Make this process one of a machine without the extras, and of a system such as Windows.

    torch and numpy are imported first: they have builds of their own for such systems.
    """
    import numpy  # noqa: F401

    for name in ABSENT:
        sys.modules[name] = None  # an import of it raises ModuleNotFoundError, and find_spec gives None
    import torch  # noqa: F401

    for name in POSIX_MODULES:
        sys.modules[name] = None
    for module, names in POSIX_NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)


def attention():
    """Compare output and gradients with full attention, which a pattern of one segment and rate 1 is."""
    import torch

    from longnet_dist import DilatedAttention, DilatedPattern, dilated_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 96, 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = dilated_attention(q, k, v, DilatedPattern([96], [1]))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    full = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, full)
    gradients = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, full))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    pattern = DilatedPattern([16, 32, 64], [1, 2, 4])
    layer = DilatedAttention(dim=64, heads=4, pattern=pattern)
    layer(torch.randn(2, 80, 64)).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())
    print("attention: output and gradients agree with full attention")


def model(folder):
    """Take some steps with torch's own optimizer, then store the model as a run of the trainer does."""
    import torch
    import yaml

    from longnet_dist import LongNet, LongNetConfig
    from longnet_dist.checkpoint.format import Progress
    from longnet_dist.checkpoint.run_folder import RunFolder
    from longnet_dist.checkpoint.writer import write_checkpoint
    from longnet_dist.data.token_file_writer import TokenFileWriter
    from longnet_dist.data.tokenizers import ByteTokenizer
    from longnet_dist.inference.generation import Sampling, generate

    torch.manual_seed(0)
    fields = {"dim": 32, "layers": 2, "heads": 2, "segment_lengths": [16, 32], "dilation_rates": [1, 2]}
    config = LongNetConfig(**fields)
    longnet = LongNet(config)
    optimizer = torch.optim.AdamW(longnet.parameters(), lr=1e-2)
    text = Path(__file__).read_bytes()
    tokens = torch.frombuffer(bytearray(text[: 4 * 65]), dtype=torch.uint8).long().view(4, 65)
    losses = []
    for _ in range(8):
        loss = longnet(tokens[:, :-1], tokens[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    new = list(generate(longnet.eval(), [list(b"def ")], 5, Sampling(seed=1)))
    assert len(new) == 5
    weights = {name: weight.detach().clone() for name, weight in longnet.named_parameters()}
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    files = {"model.safetensors": weights, "exp_avg.safetensors": zeros, "exp_avg_sq.safetensors": zeros}
    run = RunFolder(folder / "run")
    train = {"output_dir": str(run.path), "steps": 8, "batch_size": 4}
    run.describe({"model": fields, "data": {"sequence_length": 64}, "train": train}, ByteTokenizer())
    assert yaml.safe_load(run.config_file.read_text())["model"] == fields
    write_checkpoint(run.path / "checkpoints" / "step_00000008", files, config, Progress(step=8, tokens=2048))
    with TokenFileWriter(folder / "text.tokens", ByteTokenizer(), validation=0.5) as writer:
        writer.add_document([text])
    print(f"model: loss {losses[0]:.2f} to {losses[-1]:.2f} in 8 steps")


def inference(folder):
    """Evaluate the stored run whole and as a stream, and let it continue a text."""
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.inference.generation import Sampling
    from longnet_dist.inference.runs import continue_text, evaluate_run, evaluate_run_streamed

    run, data, alone = folder / "run", folder / "text.tokens", LaunchEnvironment()
    before = hashlib.sha256(data.read_bytes()).hexdigest()
    whole = evaluate_run(run, data, [256], 256, "validation", alone)[256]
    streamed = evaluate_run_streamed(run, data, 64, 256, "validation", alone)
    assert abs(whole.loss - streamed.loss) < 1e-5 * whole.loss
    assert hashlib.sha256(data.read_bytes()).hexdigest() == before
    (text,) = continue_text(run, "def ", 5, Sampling(seed=1))
    assert text.startswith("def ")
    print(f"inference: loss {whole.loss:.3f} whole and streamed")


def training_is_refused(folder):
    """Ask for training, which needs the extra ``train``; nothing may be written."""
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.config.loading import parse_config
    from longnet_dist.errors import MissingExtraError
    from longnet_dist.train.loop import run_training

    run = {"output_dir": str(folder / "no"), "steps": 1, "batch_size": 1}
    config = parse_config({"model": {"name": "tiny"}, "data": {"sequence_length": 512}, "train": run})
    message = "training began without its packages"
    try:
        run_training(config, LaunchEnvironment())
    except MissingExtraError as error:
        message = str(error)
    assert "pip install 'longnet-dist[train]'" in message, message
    print(f"training: {message}")
    assert not (folder / "no").exists()


def main():
    """Run everything in a folder that is removed afterwards; end with a traceback where something is wrong."""
    folder = Path(sys.argv[1])
    if "--fake" in sys.argv:
        hide_extras_and_posix()
    folder.mkdir()
    try:
        attention()
        model(folder)
        inference(folder)
        training_is_refused(folder)
    finally:
        shutil.rmtree(folder)
    loaded = sorted(name for name in ABSENT if sys.modules.get(name) and name not in OF_TORCH)
    assert not loaded, f"the core imported {loaded}"
    print("the core is alone")


if __name__ == "__main__":
    main()
