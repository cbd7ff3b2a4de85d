"""What converted models add to `generate`; `speculative/` has draft trees."""
