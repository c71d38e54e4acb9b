import os

import torch

# Triton decides at its own import, which DeepSpeed's brings about, whether its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors gain nothing from threads, and forked ranks share the cores.
torch.set_num_threads(1)
