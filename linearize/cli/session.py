"""One run of a command: how much it says, and what becomes of its errors."""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from ..errors import LinearizeError
from .flags import flags_of, in_flags
from .options import with_parameters


@dataclass(frozen=True)
class Loudness:
    """quiet: nothing but results and errors. verbose: also where an error came from."""

    quiet: bool = False
    verbose: bool = False


_CONTEXT = "context_of_typer"
"""What commands that do not ask for their context get it as."""
_DEFAULT = Loudness()
_LOUDNESS = ContextVar("loudness", default=_DEFAULT)
"""Of the command that runs in this context."""


def bars() -> bool | None:
    """What `progress=` is to be in functions of the package: None leaves it to them."""
    return False if _LOUDNESS.get().quiet else None


def saying(command: Callable[..., None]) -> Callable[..., None]:
    """The command, as loud as the user asked, with its errors as one line on stderr and exit code 1."""
    flags = flags_of(command)
    signature = inspect.signature(command)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    name = next((name for name, kind in kinds.items() if kind is typer.Context), _CONTEXT)
    own = inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def told(**given: Any) -> None:
        context: typer.Context = given[name] if name in kinds else given.pop(name)
        asked = context.find_object(Loudness) or Loudness()
        before = _LOUDNESS.set(asked)
        try:
            with warnings.catch_warnings():
                if asked.quiet:
                    warnings.simplefilter("ignore")
                command(**given)
        except typer.Exit:
            raise
        except Exception as error:
            if asked.verbose:
                traceback.print_exception(error)
            tell(_sentence(error, flags))
            raise typer.Exit(1) from error
        finally:
            _LOUDNESS.reset(before)

    parameters = [*signature.parameters.values(), *([] if name in kinds else [own])]
    return with_parameters(told, parameters)


def _sentence(error: Exception, flags: dict[str, str]) -> str:
    if isinstance(error, LinearizeError):
        return in_flags(str(error), flags, getattr(error, "setting", ""))
    first = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"a mistake of linearize or of a library: {first}; `linearize -v ...` says where"


def tell(message: str) -> None:
    """Print an error on stderr."""
    # soft_wrap: one line in a pipe too, whatever width is assumed for it.
    text = f"error: {message}"
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
