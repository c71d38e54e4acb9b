"""Inputs and exact results for the middle of a feed-forward network, and a block that has one."""

import torch
from torch.nn import functional as F

from longnet_dist.engine.rows import RowParts
from longnet_dist.model.longnet import LongNet
from tests.engine.test_block_run import model_config


def exact(inner, dy, h, weight, bias):
    """``y = LayerNorm(inner(h))`` with weights, then ``y`` without them, ``dh`` and its sum, in float64 by autograd."""
    h = h.double().requires_grad_()
    weighted = F.layer_norm(inner(h), dy.shape[-1:], weight.double(), bias.double(), 1e-5)
    y = F.layer_norm(inner(h), dy.shape[-1:], None, None, 1e-5)
    (dh,) = torch.autograd.grad(y, h, dy.double())
    return weighted, y, dh, dh.sum(0)


def inputs(rows, length, scale=2.0, device="cpu", dtype=torch.float32, width=1):
    """``dy``, ``h`` of ``width`` times the length, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, length), (rows, width * length), (length,), (length,)
    dy, h, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return dy, scale * h, weight, bias


def computed(functions, dy, h, weight, bias):
    """What a ``GeluNorm`` gives for :func:`inputs`, in the order of :func:`exact`."""
    return functions.forward(h, weight, bias, 1e-5), *functions.gradients(dy.clone(), h.clone(), 1e-5)


class Row:
    """A block whose biases and norms are not those of the start, and what surrounds its attention."""

    def __init__(self, **fields):
        torch.manual_seed(0)
        self.block = LongNet(model_config(**fields)).blocks[0]
        with torch.no_grad():
            for vector in (parameter for parameter in self.block.parameters() if parameter.dim() == 1):
                vector += torch.randn_like(vector) / 4
        self.x, self.out, self.dz = torch.randn(20, 16), torch.randn(20, 4, 4), torch.randn(20, 16)

    def results(self, *options):
        """Output and gradients behind the attention; ``options`` are tile and compile of ``RowParts``."""
        parts = RowParts(dict(self.block.named_parameters()), None, 4, 1e-5, *options)
        z, moments = parts.output(self.x, self.out)
        dx, dout, _, gradients = parts.output_gradients(self.x, self.out, self.dz, moments)
        return [z, dx, dout, *gradients]
