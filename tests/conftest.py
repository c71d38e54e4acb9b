import torch

# Small tensors gain nothing from threads, and forked ranks share the cores.
torch.set_num_threads(1)
