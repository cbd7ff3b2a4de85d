"""The exceptions this package raises. Every message names what was wrong, where, and what to do."""

from __future__ import annotations


class LinearizeError(Exception):
    """Base of every error raised on purpose by this package."""


class InvalidModelError(LinearizeError, TypeError):
    """The object given is not a model this call can work on (not an `nn.Module`, already converted, ...)."""


class InputError(LinearizeError, ValueError):
    """Example inputs are missing, cannot be made, or the model does not run on them."""


class NoAttentionError(LinearizeError, ValueError):
    """The model holds no softmax attention site at all."""


class RefusedError(LinearizeError, ValueError):
    """At least one site cannot be rewritten and the policy is to rewrite all or nothing.

    `report` is the full `passes.MatchReport`-derived report, so a caller can print which sites and why.
    `advice` is the part of the message that says what helps, "" where it says nothing.
    """

    def __init__(self, message: str, report: object | None = None, advice: str = "") -> None:
        super().__init__(f"{message} {advice}" if advice else message)
        self.report, self.advice = report, advice


class VerificationError(LinearizeError, RuntimeError):
    """A rewrite did not reproduce the original with the exact mechanism; nothing was applied."""


class ConfigError(LinearizeError, ValueError):
    """A setting is unknown, out of range, or contradicts another.

    `setting` is its name where the message begins with it or is about it alone, "" elsewhere: the command
    line says a flag instead.
    """

    def __init__(self, message: str = "", setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


class CheckpointError(LinearizeError, OSError):
    """A directory is not a readable, complete, converted checkpoint, or cannot be written."""


class MissingExtraError(LinearizeError, ImportError):
    """An optional dependency is absent; the message names the extra to install."""


class TrainingError(LinearizeError, RuntimeError):
    """A training run cannot go on: its loss is no number, or a checkpoint cannot be written or read."""


class ExportError(LinearizeError, RuntimeError):
    """A model cannot be written as ONNX, or the file cannot be written; nothing is left behind."""


class LibraryError(LinearizeError, RuntimeError):
    """The operators for onnxruntime cannot be built, or a file to run them on cannot be read."""
