"""Replacing weights and the record that describes them in one step, whoever reads, whoever is killed.

Two files cannot be replaced at once. But the record, a file of JSON, can say where the weights are. So:

1. All new files are in a temporary folder inside the checkpoint's.
2. A new record moves in, which names the weights inside that folder. This is the one step: a reader sees the
   old checkpoint before it and the new one from then on.
3. The weights get their usual names, what the old checkpoint had and the new one lacks is removed, and a
   record that names no place moves in. A writer that is killed meanwhile leaves a whole checkpoint, and the
   next one finishes this (`settle`).

Whoever reads the record and then weights by their usual names, while step 3 goes on, asks again whether the
record is the one that was read: `unchanged`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError, LinearizeError
from .files import files_in, link, move_all, reason, shown, staged
from .scratch import KEPT, locked, remove_abandoned

INDEX = ".index.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Layout:
    """What the files of a kind of checkpoint are called.

    Attributes:
        record: The file of JSON that says what the weights are of.
        key: The entry of it that names the weights, where they have not their usual name.
        weights: Their usual name; with `INDEX` behind it that of an index of several files.
        instead: The record of another kind of checkpoint with the same weights, which this one replaces. It
            goes if it is one of ours.
    """

    record: str
    key: str
    weights: str
    instead: str | None = None

    def commit(self, scratch: Path, home: Path) -> None:
        """Move a checkpoint into a folder, in place of one that is there. As `files.Commit`."""
        with locked(home):
            weights = self._weights(scratch)
            if weights is None or not any((home / name).exists() for name in self._records):
                if weights is not None:
                    # Of no checkpoint, but transformers would read them before ours.
                    self._remove(home, self._old_weights(home) - {file.name for file in files_in(scratch)})
                move_all(scratch, home, lambda file: file.name == self.record)
                return
            pointing = self._pointing_record(scratch, weights)
            scratch.chmod(home.stat().st_mode & 0o777)
            (scratch / KEPT).touch()
            try:
                os.replace(pointing, home / self.record)
            except BaseException:
                if pointing.exists():
                    (scratch / KEPT).unlink()
                raise
            # The new checkpoint is there. What cannot get its usual name now does so with the next save.
            with contextlib.suppress(OSError):
                self._finish(scratch, home)

    def settle(self, scratch: Path, home: Path) -> None:
        """Finish what a killed writer began. Raises OSError when that is not possible now, or not ours."""
        (scratch / self.record).stat()
        if self._weights(scratch) is None:
            raise FileNotFoundError(f"{scratch} is of another writer")
        named = read_entry(home / self.record, self.key)
        if isinstance(named, str) and Path(named).parts[:1] == (scratch.name,):
            self._finish(scratch, home)

    def _finish(self, scratch: Path, home: Path) -> None:
        """Step 3. Can be done again from wherever it ended."""
        other = home / (self.instead or self.record)
        if self.instead and any(read_entry(other, key) is not None for key in ("plan", "linearize")):
            other.unlink()
        new = {file.name for file in files_in(scratch)} - {_POINTING, _POINTED, _PLACED}
        stale = self._old_weights(home) - new
        place = scratch / _PLACED
        # The index after the weights that it names; the record after everything.
        for name in sorted(new - {self.record}, key=lambda name: (name.endswith(INDEX), name)):
            place.unlink(missing_ok=True)
            link(scratch / name, place)
            os.replace(place, home / name)
        self._remove(home, stale)
        place.unlink(missing_ok=True)
        link(scratch / self.record, place)
        os.replace(place, home / self.record)
        (scratch / KEPT).unlink()

    @property
    def _records(self) -> tuple[str, ...]:
        return (self.record,) if self.instead is None else (self.record, self.instead)

    def _weights(self, scratch: Path) -> str | None:
        """The file of a new checkpoint that leads to its weights."""
        return next(
            (name for name in (self.weights, self.weights + INDEX) if (scratch / name).exists()), None
        )

    def _pointing_record(self, scratch: Path, weights: str) -> Path:
        """The new record, naming the weights inside the temporary folder."""
        if weights.endswith(INDEX):
            index = json.loads((scratch / weights).read_text(encoding="utf-8"))
            names = index["weight_map"]
            index["weight_map"] = {key: f"{scratch.name}/{name}" for key, name in names.items()}
            weights = _POINTED
            (scratch / weights).write_text(json.dumps(index), encoding="utf-8")
        record = json.loads((scratch / self.record).read_text(encoding="utf-8"))
        record[self.key] = f"{scratch.name}/{weights}"
        pointing = scratch / _POINTING
        pointing.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return pointing

    def _old_weights(self, home: Path) -> set[str]:
        """What an earlier checkpoint there names its own: the usual names, and what its index names."""
        owned = {self.weights}
        if (home / (self.weights + INDEX)).is_file():
            owned.add(self.weights + INDEX)
            names = read_entry(home / (self.weights + INDEX), "weight_map")
            found = names.values() if isinstance(names, dict) else ()
            owned |= {name for name in found if isinstance(name, str) and is_plain(name, _SUFFIX)}
        return owned

    @staticmethod
    def _remove(home: Path, names: set[str]) -> None:
        for name in names:
            (home / name).unlink(missing_ok=True)


_POINTING, _POINTED, _PLACED = ".pointing.json", f".pointed{_SUFFIX}{INDEX}", ".placed"
TRANSFORMERS = Layout("config.json", "transformers_weights", "model.safetensors", instead="linearize.json")
"""transformers reads the entry, and leaves it out of the configs that it writes."""


@contextlib.contextmanager
def whole_checkpoint(directory: str | os.PathLike[str], layout: Layout) -> Iterator[Path]:
    """A folder to write a checkpoint in, which then takes the place of what `directory` holds of one.

    Raises CheckpointError when something cannot be written; what was there then stays.
    """
    try:
        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"cannot save to {shown(target)}: it is a file, not a directory")
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        finish_killed(target, layout)
        with staged(target, last=lambda file: file.name == layout.record, commit=layout.commit) as folder:
            yield folder
    # A name with a NUL is a ValueError, and so is one that the file system's encoding lacks.
    except (OSError, SafetensorError, UnicodeError, ValueError) as error:
        if isinstance(error, LinearizeError):
            raise
        raise CheckpointError(f"cannot save to {shown(Path(directory))}: {reason(error)}") from error


def finish_killed(home: Path, layout: Layout) -> None:
    """Finish what a killed writer of a checkpoint began, if there is such and it can be done."""
    if os.path.isdir(home):  # False for any name that no folder can have
        remove_abandoned(home, lambda scratch: layout.settle(scratch, home.resolve()))


def is_plain(name: str, suffix: str = "") -> bool:
    """Whether a name is that of a file in the folder itself."""
    return Path(name).name == name and name not in ("", ".", "..") and name.endswith(suffix)


def is_inside(name: object) -> bool:
    """Whether a name is one of a file in a folder, or in a folder below it."""
    if not isinstance(name, str) or not name or any(mark in name for mark in "\0\\:"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_entry(file: Path, key: str) -> Any:
    """An entry of a file of JSON; None where there is none, or no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get(key) if isinstance(content, dict) else None


def identity(file: Path) -> tuple[int, int, int] | None:
    """What another file in the place of this one differs in; None where there is none."""
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
