"""Generating text, plainly or by speculation."""
