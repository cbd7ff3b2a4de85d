"""Checkpoints of a training run: finding the newest complete one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None.

    The Trainer writes `trainer_state.json` last, but earlier files may still be cut off when a machine went
    down. So every file must be complete as well.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
            whole = all(_is_complete(file) for file in path.iterdir())
        except (OSError, ValueError, RecursionError):
            continue
        if whole and isinstance(state, dict) and "global_step" in state:
            return path
    return None


def _is_complete(file: Path) -> bool:
    """Whether a file of tensors is as long as its header says; True for other files. Reads no tensor."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    return file.suffix not in (".bin", ".pt", ".pth") or zipfile.is_zipfile(file)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
