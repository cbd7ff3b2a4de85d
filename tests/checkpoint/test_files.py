"""Files appear whole or not at all, in a folder that was there or in a new one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from linearize.common.files import read_json, staged, write_whole
from linearize.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_move_into_a_folder_that_is_there_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "mine").write_text("mine")
    with staged(tmp_path) as folder:
        (folder / "a").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a", "mine"]


def test_a_new_folder_appears_with_all_of_its_files_and_usual_permissions(tmp_path: Path) -> None:
    home, usual = tmp_path / "new", tmp_path / "usual"
    with staged(home) as folder:
        (folder / "a").write_text("a")
        assert not home.exists()
    usual.mkdir()
    assert names(home) == ["a"] and names(tmp_path) == ["new", "usual"]
    assert stat.S_IMODE(home.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_the_file_that_says_that_the_rest_is_there_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with staged(tmp_path, last=lambda file: file.name == "a") as folder:
        for name in "abc":
            (folder / name).touch()
    assert moved == ["b", "c", "a"]


@pytest.mark.parametrize("there", [True, False])
def test_an_error_of_the_writer_leaves_everything_as_it_was(there: bool, tmp_path: Path) -> None:
    home = tmp_path / "home"
    if there:
        home.mkdir()
        (home / "a").write_text("old")
    with pytest.raises(RuntimeError, match="no more"), staged(home) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("no more")
    assert names(tmp_path) == (["home"] if there else [])
    assert not there or ((home / "a").read_text() == "old" and names(home) == ["a"])


def test_one_file_is_written_whole_and_never_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "[1]")
    assert read_json(tmp_path / "a.json") == [1] and names(tmp_path) == ["a.json"]
    with pytest.raises(CheckpointError, match="there is no folder"):
        write_whole(tmp_path / "missing" / "a.json", "[1]")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_whole(tmp_path / "folder", "text")
    assert names(tmp_path) == ["a.json", "folder"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As a device is: `/dev/null` replaced by a file would be gone for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


def test_no_pipe_or_device_in_a_folder_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b")
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="b is there"), staged(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / "b").is_fifo()
