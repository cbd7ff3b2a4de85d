"""Saving, loading, the hook of `from_pretrained`, and checkpoints that others released."""
