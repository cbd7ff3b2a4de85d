"""The shipped decoder and the walk-through that shows it."""
