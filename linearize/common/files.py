"""Files that appear whole or not at all, and JSON files that may be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .scratch import ALIVE, KEPT, locked, scratch_folder

Commit = Callable[[Path, Path], None]
"""Moves the files of the first folder into the second, all of them or none."""


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside its place and move it in. Raises CheckpointError; what was there then stays.

    What is no file but takes bytes, such as `/dev/stdout` or a named pipe, is written to.
    """
    target = Path(path)
    try:
        if is_stream(target):
            with target.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
            return
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent}")
        with staged(target.parent) as folder:
            (folder / target.name).write_bytes(content.encode() if isinstance(content, str) else content)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {shown(target)}: {reason(error)}") from error


@contextlib.contextmanager
def staged(
    home: Path, last: Callable[[Path], bool] = lambda file: False, commit: Commit | None = None
) -> Iterator[Path]:
    """A new folder to write files in, which move into the folder `home` at the end, all or none.

    An error before or while they move, raised by whoever writes too, leaves `home` as it was. A `home` that
    does not exist appears in one step with all of its files. What killed writers left is removed.

    Args:
        home: The folder that the files are for. Its parent exists.
        last: Whether a file goes after the others: the one that says that the rest is there.
        commit: Moves the files into a `home` that is there, instead of one after the other. Where their
            folder is still needed, it leaves the mark `scratch.KEPT` in it.

    Yields:
        The folder to write in: inside `home`, which may be a mount point, or beside it where there is none.

    Raises:
        OSError: Something cannot be written.
    """
    home = home.resolve()  # a link to nowhere is no place for a folder, what it names is
    move = commit or (lambda files, place: move_all(files, place, last))
    there = home.is_dir()
    with scratch_folder(home if there else home.parent, home) as scratch:
        yield scratch
        if not there:
            if _appear(scratch, home):
                return
            # Another writer was faster: its files are there now, and ours replace them.
            scratch = scratch.rename(home / scratch.name)
        for file in files_in(scratch):
            check_replaceable(home / file.name)
        move(scratch, home)


def is_stream(path: Path) -> bool:
    """Whether a name is that of a pipe or a character device."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)


def check_replaceable(path: Path) -> None:
    """Raise OSError where a file may not take the place of what is there: a device would be gone for all."""
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind) or stat.S_ISDIR(kind)):
            raise FileExistsError(f"{path.name} is there and is no file")


def _appear(scratch: Path, home: Path) -> bool:
    """Make the folder `home` of another; False where there is one meanwhile."""
    # A temporary folder is private; this one gets the permissions that any new folder has.
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(0o777 & ~umask)
    with locked(scratch.parent):  # or it would be taken for one whose writer is gone
        (scratch / ALIVE).unlink()
        try:
            os.rename(scratch, home)
        except OSError:
            if not home.is_dir():
                raise
            (scratch / ALIVE).touch()
            return False
    return True


def move_all(scratch: Path, home: Path, last: Callable[[Path], bool]) -> None:
    """Move files into a folder, each whole; those moved already go back when one cannot be moved."""
    before = scratch / ".before"
    before.mkdir()
    moved: list[str] = []
    try:
        for file in sorted(files_in(scratch), key=lambda file: (last(file), file.name)):
            moved.append(file.name)
            if (home / file.name).is_file():
                link(home / file.name, before / file.name)
            os.replace(file, home / file.name)
    except BaseException:
        for name in reversed(moved):
            if (before / name).exists():
                os.replace(before / name, home / name)
            elif not (scratch / name).exists():
                (home / name).unlink(missing_ok=True)
        raise


def files_in(folder: Path) -> list[Path]:
    """What a writer put into a temporary folder."""
    return [path for path in folder.iterdir() if not path.is_dir() and path.name not in (ALIVE, KEPT)]


def link(file: Path, name: Path) -> None:
    """A second name for a file, or a copy where the file system has no such."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


def try_writing(folder: Path) -> None:
    """Write a file into a folder, and remove it. Raises OSError when that is not possible."""
    with scratch_folder(folder, folder) as scratch:
        (scratch / "try").write_bytes(bytes(4096))


def is_file(path: Path) -> bool:
    """As `Path.is_file`; False too for a name that no file can have, and for a link to itself."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_same(first: Path, second: Path) -> bool:
    """Whether two names are those of one file that is there."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """Why the system refused, in a line: without the paths, which are long and may be of temporary files."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = str(text).replace("\0", "\\0").splitlines()[0]
    return line.encode("utf-8", "backslashreplace").decode()[:300]


def shown(path: Path) -> str:
    """A path as a message can hold it: short, and in characters that every terminal takes."""
    text = str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown(path.parent)} is not a checkpoint: {path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from error
