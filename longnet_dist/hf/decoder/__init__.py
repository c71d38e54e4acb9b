"""Decoders of transformers as models of a run: with streams, ranks, and the loss in chunks."""
