"""``python -m longnet_dist`` is the command ``longnet``."""

from longnet_dist.cli.program.dispatch import run

if __name__ == "__main__":
    run()
