"""Replacing the files of an exported folder in one step, whoever reads, whoever is killed.

A graph and its weights are one step by themselves: the weights have a name of their own. But a graph, a
second one and the configurations beside them must be of one export too. So:

1. All new files are in a temporary folder inside the target.
2. A note moves in that names this folder. This is the one step: `undisturbed` reads the old files before it,
   and from then on those that the note names.
3. The files get their places and the note goes. A writer that is killed meanwhile leaves a whole export, and
   the next reader or writer finishes this.

Others than we know nothing of the note. For them the old graphs go first in step 3 and the new ones come
last: for a fraction of a millisecond, or until a killed writer's work is finished, they find no graph, never
one beside the configuration of another.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..common.files import files_in, is_file, link, move_all, shown
from ..common.replacing import identity, is_plain, read_entry
from ..common.scratch import KEPT, PREFIX, locked, remove_abandoned
from ..errors import ExportError, LinearizeError

Result = TypeVar("Result")
NOTE = f"{PREFIX}export.json"
GRAPH, WEIGHTS = ".onnx", ".onnx.data"
_PLACED = ".placed"
_TRIALS = 8


def commit(scratch: Path, home: Path, stale: Iterable[str]) -> None:
    """Move an export into a folder in place of one that is there; as `files.Commit`.

    stale: files of the old export that the new one does not have.
    """
    with locked(home):
        new = {file.name for file in files_in(scratch)}
        if not any((home / name).exists() for name in new):
            move_all(scratch, home, lambda file: file.suffix == GRAPH)
            return
        note = scratch / NOTE
        content = {"folder": scratch.name, "files": sorted(new), "stale": sorted(set(stale) - new)}
        note.write_text(json.dumps(content) + "\n", encoding="utf-8")
        scratch.chmod(home.stat().st_mode & 0o777)
        (scratch / KEPT).touch()
        try:
            os.replace(note, home / NOTE)
        except BaseException:
            if note.exists():
                (scratch / KEPT).unlink()
            raise
        # The new export is there. What cannot get its place now does so with the next reader or writer.
        with contextlib.suppress(OSError):
            _finish(scratch, home)


def finish_killed(home: Path) -> None:
    """Finish what a killed writer began, if there is such and it can be done."""
    if os.path.isdir(home):
        remove_abandoned(home, lambda scratch: _settle(scratch, home))


def undisturbed(file: Path, read: Callable[[Path], Result]) -> Result:
    """What `read` gives of a graph, from where it lies with those of its export; again where others replace
    them meanwhile. After a few trials the others wait. Raises what `read` raises."""
    home = file.parent
    finish_killed(home)
    waiting = False  # others wait for us
    for trial in range(_TRIALS):
        waiting = waiting or trial >= _TRIALS // 2
        with locked(home) if waiting else contextlib.nullcontext():
            before = _identity(home)
            error: LinearizeError | None = None
            try:
                place = _place(home) / file.name
                found = read(place if is_file(place) else file)
            except LinearizeError as problem:
                error = problem
            if before != _identity(home):
                continue
            if error is None:
                return found
            if waiting:
                raise error
            waiting = True  # two exports within a tick of the clock may look alike
    raise ExportError(f"{shown(home)} is being written all the time; open it when that has ended")


def _place(home: Path) -> Path:
    """Where the files of an export are: in the folder itself, or in one inside that a note names."""
    named = read_entry(home / NOTE, "folder")
    if isinstance(named, str) and is_plain(named) and named.startswith(PREFIX) and (home / named).is_dir():
        return home / named
    return home


def _identity(home: Path) -> list[tuple[str, tuple[int, int, int] | None]]:
    try:
        names = sorted(file.name for file in home.iterdir() if file.suffix in (GRAPH, ".json"))
    except (OSError, ValueError):
        return []
    return [(name, identity(home / name)) for name in names]


def _settle(scratch: Path, home: Path) -> None:
    """Finish what a temporary folder was kept for, if it still is. Raises OSError where it is not ours."""
    if _place(home) == scratch:
        _finish(scratch, home)
    elif not any(file.suffix == GRAPH for file in files_in(scratch)):
        raise FileNotFoundError(f"{scratch} is of another writer")


def _finish(scratch: Path, home: Path) -> None:
    """Step 3. Can be done again from wherever it ended."""
    names = {key: _names(home / NOTE, key) for key in ("files", "stale")}
    # One file that differs is replaced in one step for everyone.
    differ = [
        name for name in names["files"] if name.endswith(GRAPH) or not _equal(scratch / name, home / name)
    ]
    if len([name for name in differ if not name.endswith(WEIGHTS)]) > 1:
        for name in names["files"]:
            if name.endswith(GRAPH):
                (home / name).unlink(missing_ok=True)
    place = scratch / _PLACED
    for name in sorted(names["files"], key=lambda name: (name.endswith(GRAPH), name)):
        place.unlink(missing_ok=True)
        link(scratch / name, place)
        os.replace(place, home / name)
    for name in names["stale"]:
        (home / name).unlink(missing_ok=True)
    (home / NOTE).unlink()
    (scratch / KEPT).unlink()
    for name in names["files"]:  # onnx refuses weights that have a second name
        (scratch / name).unlink(missing_ok=True)


def _names(note: Path, key: str) -> list[str]:
    found = read_entry(note, key)
    return (
        [name for name in found if isinstance(name, str) and is_plain(name)]
        if isinstance(found, list)
        else []
    )


def _equal(first: Path, second: Path) -> bool:
    return is_file(second) and filecmp.cmp(first, second, shallow=False)
