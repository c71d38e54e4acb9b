"""``longnet export``, from a checkout: python launch/export.py --help."""

from installed import run

if __name__ == "__main__":
    run("export")
