"""What messages call a setting on the command line: `keep_softmax` is `--keep-softmax` there.

The package names arguments of Python in its errors, and here they become the options of the command that was
run: where a message writes `name=value`, quotes a name in backticks, or begins with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from typer.models import OptionInfo

_CALLED = {
    "options": "option",
    "layer_options": "layer_option",
    "max_tokens": "tokens",
    "output_dir": "checkpoints",
}
"""Arguments of Python whose option has another name."""
_SETTINGS = ("layers", "keep_softmax", "layer_options", "approximate", "mechanism")
"""What messages begin with that no word of English could be mistaken for."""
_SENTENCES = {
    "call linearize(model) first": "`linearize convert` makes one that is",
    "; give them: linearize(model, inputs)": "; in Python, linearize(model, inputs) takes them",
}


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """Option by argument of Python, for a command whose groups are spread out."""
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = parameter.annotation
        info = next((x for x in get_args(kind) if isinstance(x, OptionInfo)), None)
        if get_origin(kind) is Annotated and info is not None:
            declared = [word for word in info.param_decls or () if word.startswith("--")]
            found[name] = declared[0].partition("/")[0] if declared else f"--{name.replace('_', '-')}"
    return found | {name: found[called] for name, called in _CALLED.items() if called in found}


def in_flags(message: str, flags: Mapping[str, str], setting: str = "") -> str:
    """A message with the options of a command in place of arguments. setting: what it is about."""
    for sentence, here in _SENTENCES.items():
        message = message.replace(sentence, here)
    for name, flag in flags.items():
        message = re.sub(rf"\b{name}=\(([^()]*)\)", partial(_several, flag), message)
        message = re.sub(rf'\b{name}=\{{"(\w+)": ([^{{}}]*)\}}', rf"{flag} \1=\2", message)
        message = re.sub(rf"""\b{name}=(?:'([^']*)'|"([^"]*)"|([\w./-]+))""", rf"{flag} \1\2\3", message)
        message = re.sub(rf"\b{name}=(?![\w=])", flag, message)
        message = message.replace(f"`{name}`", flag)
        if "_" in name:
            message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag, message)
        message = re.sub(rf"^{name}\b(?= must )", flag, message)
        if name in _SETTINGS:
            message = re.sub(rf"^{name}\b", flag, message)
    if setting in flags and flags[setting] not in message:
        message = re.sub(rf"(?<![\w'-]){setting}(?![\w'])", flags[setting], message, count=1)
    return message


def _several(flag: str, values: re.Match[str]) -> str:
    """`--flag a --flag b` for what stands in a tuple; numbers of layers are one value."""
    items = [item.strip().strip("'\"") for item in values[1].split(",") if item.strip()]
    if flag == "--layers":
        return f"{flag} {','.join(items)}"
    return " ".join(f"{flag} {item}" for item in items)
