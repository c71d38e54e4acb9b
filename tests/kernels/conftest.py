import os

import torch

# Triton decides when a kernel is defined whether its interpreter runs it; here, before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
