"""Writes what follows the mark in docs/command-line.md, from the commands themselves.

    ./run python docs/command_line.py

A test compares the page with what this would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from linearize.cli import app

PAGE = Path(__file__).resolve().parent / "command-line.md"
MARK = "<!-- What follows is written by docs/command_line.py: change the commands, not this text. -->\n"


def reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("linearize", [], resilient_parsing=True)
    return "\n".join(
        _command(name, group.get_command(context, name), context) for name in group.list_commands(context)
    )


def _command(name: str, command: Any, group: Any) -> str:
    context = command.make_context(name, [], parent=group, resilient_parsing=True)
    usage = " ".join(["linearize", name, *command.collect_usage_pieces(context)])
    lines = [f"## {name}", "", command.help.strip(), "", "```text", usage, "```", ""]
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            rows.append([f"`{_cell(record[0])}`", _cell(record[1])])
    if rows:
        lines += ["| argument or option | meaning |", "|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def page(before: str) -> str:
    """The page `before`, with what follows the mark written anew."""
    written, mark, _ = before.partition(MARK)
    assert mark, f"{PAGE} has lost its mark"
    return f"{written}{MARK}\n{reference()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
