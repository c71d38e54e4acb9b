"""LongNet as a model of transformers: configuration, model, cache for generation, and what an export writes."""
