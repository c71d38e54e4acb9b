"""``longnet evaluate`` for launchers: torchrun --nproc_per_node=8 launch/evaluate.py RUN_DIR --data FILE ..."""

from installed import run

if __name__ == "__main__":
    run("evaluate")
