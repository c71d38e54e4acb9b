"""One new file that adds an optimizer, a schedule, a position encoding and an offset rule."""

import torch

from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS, PositionEncoding, turns_of_wavelengths
from longnet_dist.optim.optimizers import OPTIMIZERS, OptimizerRule, decay_groups
from longnet_dist.optim.schedules import SCHEDULES


@OPTIMIZERS.register("sgd")
class Sgd(OptimizerRule):
    @staticmethod
    def states(role, shape):
        return {"momentum_buffer": shape}

    @staticmethod
    def build(parameters, train):
        return torch.optim.SGD(decay_groups(parameters, train), lr=train.learning_rate, momentum=0.9)


@SCHEDULES.register("halves")
def halves(done, total, train):
    return 0.5**done


@POSITION_ENCODINGS.register("half_rope")
class HalfRope(PositionEncoding):
    @staticmethod
    def turns(head_dim, settings):
        return tuple(turn * (pair % 2) for pair, turn in enumerate(turns_of_wavelengths(settings.theta, head_dim)))


@OFFSET_RULES.register("backwards")
class Backwards(OffsetRule):
    @staticmethod
    def offsets(rate, heads):
        return tuple(rate - 1 - head % rate for head in range(heads))
