"""Dilated attention and its rotations as operators of torch, through which ``torch.compile`` and ``torch.export`` go.

A compiler cannot follow the plans and launches of a call. It sees an operator instead, whose arguments are tensors and
plain numbers. Outside a compiler nothing here runs. Calls over ranks and of streams stay outside a graph.
"""
