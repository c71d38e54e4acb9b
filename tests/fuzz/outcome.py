"""How a program ended, and whether it kept its hands off what it was given."""

import hashlib
import signal
from contextlib import contextmanager

from longnet_dist.cli.program.exit_status import run_cli

SECONDS = 60


def check(capsys, program, arguments, inputs):
    """Run a program's ``main``: success or one clear error with status 2, in time, and ``inputs`` are as they were."""
    before = fingerprint(inputs)
    capsys.readouterr()
    status = 0
    with time_limit(f"{program.__name__} {arguments}"):
        try:
            run_cli(lambda: program.main([str(word) for word in arguments]))
        except SystemExit as end:
            status = end.code or 0
    errors = capsys.readouterr().err
    told = f"{program.__name__} {arguments!r} ended with {status}: {errors}"
    assert status in (0, 2), told
    assert "Traceback" not in errors, told
    if status == 2:
        assert sum("error: " in line for line in errors.splitlines()) >= 1, told
        assert len(errors) < 5000, told
    assert fingerprint(inputs) == before, f"{told}: changed what it was given"
    return status


@contextmanager
def time_limit(what):
    def late(*_):
        raise TimeoutError(f"{what} goes on after {SECONDS} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def fingerprint(folder):
    """Every path below a folder, with the SHA-256 of the files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
