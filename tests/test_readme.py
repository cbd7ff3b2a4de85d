"""The README's examples run, in order, as one session in an empty folder."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [
        (m.start(), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) >= 7
    session: dict[str, object] = {"__name__": "readme"}
    for start, code in blocks:
        # Line numbers of the README in a traceback.
        padding = "\n" * (TEXT[:start].count("\n") + 1)
        exec(compile(padding + code, str(ROOT / "README.md"), "exec"), session)  # noqa: S102
    report = session["report"]
    assert len(report.sites) == 1 and not report.refusals  # type: ignore[attr-defined]
    assert session["new"] and not any("layers.0." in name for name in session["new"])  # type: ignore[attr-defined]


def test_the_commands_it_names_exist() -> None:
    script = ROOT / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    for word in ("demo", "test"):
        assert f"./run {word}" in TEXT and re.search(rf"^    {word}\)", script.read_text(), re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('run" test')


def test_the_files_it_names_exist() -> None:
    for name in ("constraints.txt", "docs/survey.md"):
        assert name in TEXT and (ROOT / name).is_file()
