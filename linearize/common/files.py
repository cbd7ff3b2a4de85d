"""Files that appear whole or not at all, and JSON files that may be damaged."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside its place and move it in. Raises CheckpointError; what was there then stays."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
