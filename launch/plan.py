"""``longnet plan``, from a checkout: python launch/plan.py --help."""

from installed import run

if __name__ == "__main__":
    run("plan")
