"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .errors import CheckpointError


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
