"""``longnet prepare``, from a checkout: python launch/prepare_data.py --help."""

from installed import run

if __name__ == "__main__":
    run("prepare")
