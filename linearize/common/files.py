"""Files that appear whole or not at all, and JSON files that may be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside its place and move it in. Raises CheckpointError; what was there then stays."""
    target = Path(path)
    try:
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent}")
        with staged(target.parent) as folder:
            (folder / target.name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


@contextlib.contextmanager
def staged(home: Path, last: Callable[[Path], bool] = lambda file: False) -> Iterator[Path]:
    """A new folder to write files in, which move into the folder `home` at the end, each whole.

    An error before that, raised by whoever writes too, leaves `home` as it was. A `home` that does not exist
    appears in one step with all of its files.

    Args:
        home: The folder that the files are for. Its parent exists.
        last: Whether a file goes after the others: the one that says that the rest is there.

    Yields:
        The folder to write in: inside `home`, which may be a mount point, or beside it where there is none.

    Raises:
        OSError: Something cannot be written.
    """
    there = home.is_dir()
    scratch = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home if there else home.parent))
    try:
        yield scratch
        if there:
            for file in sorted(scratch.iterdir(), key=lambda file: (last(file), file.name)):
                os.replace(file, home / file.name)
        else:
            # mkdtemp makes a private folder; this one gets the permissions that any new folder has.
            umask = os.umask(0)
            os.umask(umask)
            scratch.chmod(0o777 & ~umask)
            os.replace(scratch, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
