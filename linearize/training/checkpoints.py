"""Checkpoints of a training run: which is the newest that is whole."""

from __future__ import annotations

import json
from pathlib import Path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None where there is none.

    The Trainer writes `trainer_state.json` last, so a folder in which it can be read is whole.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and "global_step" in state:
            return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
