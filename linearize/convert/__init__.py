"""`linearize()` and `inspect()`: example inputs, the proof on the live model, the report."""
