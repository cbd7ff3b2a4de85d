"""README.md and docs/: the examples run, links lead somewhere, what is generated is as the code is now."""

from __future__ import annotations

import importlib.util
import re
import stat
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import linearize
from linearize import errors, onnx, ops, passes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SLOW = frozenset({"docs/onnx.md", "docs/recovery.md"})
"""Pages whose examples take more than about half a minute."""

FENCE = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_RUN = "no-run"
"""After ```python: an example that needs what a test does not have, such as a GPU or a download."""


def examples(page: Path) -> list[tuple[int, str]]:
    """Line number and code of every example that runs. Raises ValueError for a word that means nothing."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        word, code = match[2].strip(), textwrap.dedent(match[3])
        if word not in ("", NOT_RUN):
            raise ValueError(f"{page.name}: ```python {word}; the one word known is {NOT_RUN}")
        if not word:
            found.append((text[: match.start(3)].count("\n"), code))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_EXAMPLES = [page for page in PAGES if examples(page)]


def test_the_ways_in_and_what_follows_have_examples() -> None:
    wanted = {
        "README.md",
        *(f"docs/{topic}.md" for topic in ("conversion", "recovery", "generation", "onnx")),
    }
    assert wanted <= {name(page) for page in WITH_EXAMPLES}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if name(page) in SLOW else ()) for page in WITH_EXAMPLES],
    ids=name,
)
def test_every_example_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of a page run in order, as one session, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {"__name__": "examples"}
    for line, code in examples(page):
        # Blank lines first, so that a traceback has the line numbers of the page.
        exec(compile("\n" * line + code, str(page), "exec"), session)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = page if not file else page.parent / file
        assert found.exists(), f"{name(page)} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link, by the rule of code hosts."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 220


def test_every_page_is_in_the_contents() -> None:
    contents = re.search(r"^```\{toctree\}\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.M | re.S)
    assert contents is not None
    listed = [line for line in contents[1].splitlines() if line and not line.startswith(":")]
    pages = {path.stem for suffix in ("md", "rst") for path in (ROOT / "docs").glob(f"*.{suffix}")}
    assert set(listed) == (pages - {"index"}) | {"../README", "../CONTRIBUTING", "../CHANGELOG"}


def test_every_public_name_is_in_the_reference() -> None:
    """That each of them has a docstring that renders is what `./run docs` finds out."""
    text = (ROOT / "docs/api.rst").read_text()
    described = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$|^\.\. data:: ([\w.]+)$", text, re.MULTILINE))
    described = {name for pair in described for name in pair}
    described |= {f"linearize.{n}" for n in vars(errors)}  # by the line of all errors, below
    offered = {n for n in linearize.__all__ if not n.startswith("_")}
    modules = {n for n in offered if isinstance(getattr(linearize, n), ModuleType)}
    assert offered - modules <= {n.removeprefix("linearize.") for n in described}
    for module in (ops, passes, onnx):
        # What lz offers itself is described there.
        wanted = {f"{module.__name__}.{n}" for n in module.__all__ if n not in offered}
        assert wanted <= described
    assert f"automodule:: {errors.__name__}\n   :members:" in text


def test_the_page_of_the_command_line_is_as_the_commands_are() -> None:
    spec = importlib.util.spec_from_file_location("command_line", ROOT / "docs" / "command_line.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text()
    assert text == module.page(text), "run `./run python docs/command_line.py`"
    assert len(re.findall(r"^## ", module.reference(), re.MULTILINE)) >= 10


def test_the_commands_that_are_named_exist() -> None:
    script = ROOT / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    readme, contributing = ((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
    for word, page in (
        ("demo", readme),
        ("test", contributing),
        ("lint", contributing),
        ("docs", contributing),
    ):
        assert f"./run {word}" in page and re.search(rf"^    {word}\)", script.read_text(), re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text()
    assert '"$run" test\n' in ci and '"$run" docs\n' in ci


def test_every_file_that_is_run_or_named_exists() -> None:
    """`./run python FILE`, and files in backticks with a folder of the repository before them."""
    folders = "linearize|benchmarks|examples|tests|docs|passes|kernels"
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for file in re.findall(
            rf"(?:^|[\s`])((?:{folders})/[\w/-]+\.(?:py|md|json|svg|png))\b", page.read_text()
        ):
            assert (ROOT / file).is_file(), f"{name(page)} names {file}"


def test_the_license_is_the_one_the_metadata_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text and "END OF TERMS" in text
    assert f"## [{linearize.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
