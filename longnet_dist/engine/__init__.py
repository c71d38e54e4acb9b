"""The engine: how recognised blocks run fast.

:class:`~longnet_dist.model.block.Block` is the mathematics, and it runs unless an engine is attached. The engine
computes the same block in tiles, with hand-written gradients, compiled parts and offloaded activations. It takes over
the blocks that :mod:`longnet_dist.engine.recognition` accepts and leaves all others to their own modules.
"""
