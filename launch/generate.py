"""``longnet generate``, from a checkout: python launch/generate.py --help."""

from installed import run

if __name__ == "__main__":
    run("generate")
