"""`python -m linearize`: the same as the `linearize` command."""

from __future__ import annotations

from .cli import main

main()
