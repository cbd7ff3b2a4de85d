"""What a command makes sure of before it loads a model, so that no work is lost at its end."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ..common.files import check_replaceable, is_stream, reason, shown, try_writing
from ..errors import CheckpointError, ConfigError, MissingExtraError


def check_folder(target: Path, source: Path | None = None) -> None:
    """Raise CheckpointError unless files can be written into a folder, which need not be there yet.

    Something is written to find out: permissions tell little of full disks, and nothing to root.
    source: the folder of the model, which must be another one.
    """
    try:
        if source is not None and target.resolve() == source.resolve():
            raise CheckpointError(f"{shown(target)} is the model to start from; write to another folder")
        nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise CheckpointError(f"cannot write to {shown(target)}: {shown(nearest)} is no folder")
        try_writing(nearest)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write to {shown(target)}: {reason(error)}") from error


def check_file(target: Path | None) -> None:
    """Raise CheckpointError unless a file can be written; its folder must be there, or it is a pipe."""
    if target is None or is_stream(target):
        return
    try:
        if target.is_dir():
            raise CheckpointError(f"cannot write {shown(target)}: it is a folder")
        if not target.parent.is_dir():
            raise CheckpointError(f"cannot write {shown(target)}: there is no folder {shown(target.parent)}")
        check_replaceable(target)
        try_writing(target.parent)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {shown(target)}: {reason(error)}") from error


def check_plot(target: Path | None) -> None:
    """Raise InputError, MissingExtraError or CheckpointError unless a plot can be drawn to a file."""
    if target is not None:
        from ..evaluation.plot import check_format

        check_format(target)
        check_extra("eval", "matplotlib")
        check_file(target)


def check_texts(paths: Iterable[Path] | None) -> None:
    """Raise InputError for a path that is neither a text file nor a folder of them."""
    from ..common.text import readable_texts

    readable_texts(paths or ())


def check_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtraError where a package of an extra is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {' and '.join(missing)}: install the extra, pip install 'linearize[{extra}]'"
        )


def check_resume(resume: bool, checkpoints: Path | None) -> None:
    """Raise ConfigError where there is nothing to resume from."""
    if resume and checkpoints is None:
        raise ConfigError("--resume continues from a checkpoint: name the folder with --checkpoints")
    if checkpoints is not None:
        check_folder(checkpoints)


def check_report(name: str) -> None:
    """Raise ConfigError unless metrics can be sent to what is named, as transformers' trainer does."""
    from ..training.trainer import check_report as check

    check(name)
