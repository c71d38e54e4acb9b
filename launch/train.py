"""``longnet train`` for launchers: torchrun --nproc_per_node=8 launch/train.py [CONFIG] [key=value ...].

It differs in two things: it never starts ranks, and without a configuration it trains the quick start.
"""

from installed import run

if __name__ == "__main__":
    run("train", as_rank=True)
