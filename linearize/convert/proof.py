"""Proof on the live model: with the exact mechanism, the rewritten model must equal the original.

Compared are the outputs on every example input at the real tokens, each owner by itself with enlarged input
(the small weights of a fresh model hide a lost scale or softcap), the cached decode of models that generate,
and the number of times each child was called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.lookup import find_cache
from ..common.given import run_model
from ..common.precise import wide
from ..common.running import floats, shapes
from ..errors import VerificationError
from .decoding import CacheProof, Decoded, cache_proof, decode, tolerance

GAIN = 16.0
"""Factor on an owner's hidden states: scores grow by its square, so what acts on scores becomes visible."""


@dataclass
class OwnerCall:
    """First recorded call of an owner: arguments, and outputs as given and with enlarged input."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: tuple[Tensor, ...]
    enlarged: tuple[Tensor, ...] | None = None


@dataclass
class Recording:
    """What the original model does: everything verification compares with.

    calls: forward calls per owner in one run. outputs: floating outputs per example input. generated: greedy
    decoding per example input, None where the model does not generate. cache: where its cache can be proved.
    hidden: bool `[B]`, sequences of the call that is compared now that mean nothing.
    """

    inputs: Sequence[Mapping[str, Any]]
    calls: Counter[str] = field(default_factory=Counter)
    owners: dict[str, OwnerCall] = field(default_factory=dict)
    outputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    generated: list[Decoded | None] = field(default_factory=list)
    cache: CacheProof | None = None
    hidden: Tensor | None = None

    def hide(self, sequences: Tensor) -> None:
        """Leave sequences, bool `[B]`, out of the comparison: those of which a mask hides every token."""
        known = self.hidden
        self.hidden = sequences if known is None or known.shape != sequences.shape else known | sequences


def record(model: nn.Module, paths: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> Recording:
    """Run the original and keep what `verify` compares with. Call inside `quiet_run`."""
    recording = Recording(inputs)
    first: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    handles = []
    for path in dict.fromkeys(paths):

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            recording.calls[path] += 1
            first.setdefault(path, (args, dict(kwargs), output))

        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    try:
        # With hooks, torch's own modules leave their fused path, as they do once rewritten.
        recording.outputs.append(run_model(model, inputs[0]))
    finally:
        for handle in handles:
            handle.remove()
    recording.outputs += [run_model(model, example) for example in inputs[1:]]
    recording.generated = [decode(model, example) for example in inputs]
    recording.cache = cache_proof(model, inputs, recording.generated)
    for path, (args, kwargs, output) in first.items():
        if path == "" or find_cache(args, kwargs) is not None:
            continue
        owner = model.get_submodule(path)
        recorded = OwnerCall(args, kwargs, floats(output))
        recorded.enlarged = _enlarged(owner, recorded)
        recording.owners[path] = recorded
    return recording


def _enlarged(owner: nn.Module, recorded: OwnerCall) -> tuple[Tensor, ...] | None:
    """Output with every hidden state times GAIN; None in half precision, where rounding dominates."""

    grown: dict[int, Tensor] = {}

    def grow(value: Any) -> Any:
        hidden = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
        if not hidden or value.dtype not in (torch.float32, torch.float64):
            return value
        # One object stays one object: query, key and value of self-attention are often the same tensor.
        return grown.setdefault(id(value), value * GAIN)

    args = tuple(grow(value) for value in recorded.args)
    # Of the keyword arguments only those named like activations: position tables also have three axes.
    kwargs = {
        name: grow(value) if "states" in name or name in ("x", "input") else value
        for name, value in recorded.kwargs.items()
    }
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    originals = [value for value in (*recorded.args, *recorded.kwargs.values()) if isinstance(value, Tensor)]
    if all(a is b for a, b in zip(tensors, originals, strict=True)):
        return None
    return floats(owner(*args, **kwargs))


def verify(model: nn.Module, recording: Recording) -> None:
    """Compare `model`, rewritten with the exact mechanism, with the recording of the original.

    Raises VerificationError naming the first thing that differs. Call inside `quiet_run`.
    """
    for path, recorded in recording.owners.items():
        owner = model.get_submodule(path)
        # The owners were recorded on the first example. A left-padded query that sees no key averages all
        # values in one spelling and is zero in another.
        recording.hidden = None
        found = floats(owner(*recorded.args, **recorded.kwargs))
        real = partial(_real, inputs=recording.inputs[0], hidden=recording.hidden)
        _compare(real(recorded.output), real(found), path, 1.0, skip_weights=True)
        if recorded.enlarged is not None:
            found = _enlarged(owner, recorded) or ()
            what = f"{path} with enlarged input"
            _compare(real(recorded.enlarged), real(found), what, 10.0, skip_weights=True)
    for example, expected in zip(recording.inputs, recording.outputs, strict=True):
        recording.hidden = None
        found = run_model(model, example)
        real = partial(_real, inputs=example, hidden=recording.hidden)
        _compare(real(expected), real(found), f"the model on ({shapes(example)})", 1.0)


def verify_generation(model: nn.Module, recording: Recording) -> None:
    """Compare greedy decoding with the recording of the original. Raises as `verify`."""
    for example, decoded in zip(recording.inputs, recording.generated, strict=True):
        if decoded is not None:
            found = decode(model, example, decoded.tokens, must=True)
            _compare(decoded.scores, () if found is None else found.scores, "cached decoding", 1.0)


def _real(
    outputs: tuple[Tensor, ...], inputs: Mapping[str, Any], hidden: Tensor | None
) -> tuple[Tensor, ...]:
    """Outputs with padding tokens, and `hidden` sequences, set to zero: they mean nothing and may differ.

    A softmax over nothing is no number in one spelling, the mean of all values in another, and here zero.
    """
    masks = [
        v for n, v in inputs.items() if isinstance(v, Tensor) and v.ndim == 2 and n.endswith("attention_mask")
    ]
    result = []
    for output in outputs:
        for mask in masks:
            if output.ndim >= 2 and output.shape[:2] == mask.shape:
                output = output.masked_fill(~mask.bool().reshape(*mask.shape, *[1] * (output.ndim - 2)), 0)
        if hidden is not None and bool(hidden.any()):
            # The batch comes first, or second after the tokens.
            axis = next((a for a, n in enumerate(output.shape[:2]) if n == len(hidden)), None)
            if axis is not None:
                output = output.index_fill(axis, hidden.nonzero().flatten(), 0)
        result.append(output)
    return tuple(result)


def _compare(
    expected: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
    what: str,
    slack: float,
    skip_weights: bool = False,
) -> None:
    if skip_weights:
        # Attention weights are not returned by fused attention; the first output is the owner's result.
        expected, found = expected[:1], found[:1]
    if len(expected) != len(found):
        raise VerificationError(f"{what}: {len(expected)} outputs became {len(found)}; nothing was changed")
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            raise VerificationError(
                f"{what}: output {index} changed shape from {tuple(a.shape)} to {tuple(b.shape)}"
            )
        if a.numel() == 0:
            continue
        error = (wide(a) - wide(b)).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
        if torch.equal(torch.isfinite(a), torch.isfinite(b)) and not torch.isfinite(a).all():
            finite = torch.isfinite(a)
            error = (wide(a[finite]) - wide(b[finite])).abs().max().item() if finite.any() else 0.0
        size = wide(a).abs().nan_to_num(posinf=0.0).clamp(max=1e30).max().item()
        allowed = tolerance(a.dtype) * slack * max(size, 1e-3)
        if not error <= allowed:
            raise VerificationError(
                f"{what}: with exact softmax the rewritten model differs from the original by {error:.3g} "
                f"(allowed {allowed:.3g}); nothing was changed"
            )
