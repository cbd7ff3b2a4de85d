"""Layers of transformers caches: states of constant size, keys and values, summaries of an encoder."""
