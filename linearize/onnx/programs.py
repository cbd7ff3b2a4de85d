"""What of a model becomes a graph: which tensors go in and come out, by which names, traced by torch.export.

Nothing here knows an architecture. Which layers keep a state, and which keys and values, is seen in the cache
that one run of the model fills.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..attention import AttentionModule
from ..cache import is_cache
from ..errors import ExportError
from ..inputs import example_inputs
from ..state_layer import StateLayer
from ..verification import call as call_model
from ..verification import without_cache
from . import nodes
from .nodes import Call, Past
from .past import ExportLayer, KeyValueLayer, empty

BATCH, LENGTH, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
_COLUMNS = 7
"""Tokens before the call in the example of a decoder, unlike the batch and the length."""


@dataclass(frozen=True)
class StateNames:
    """Names of a decoder's states in the file; `%d` is the layer. The defaults are those of onnxruntime-genai.

    A mechanism with more than one state in a layer adds `.1`, `.2`, ... to the names of the others.
    """

    past_recurrent: str = "past.%d.recurrent"
    past_conv: str = "past.%d.conv"
    present_recurrent: str = "present.%d.recurrent"
    present_conv: str = "present.%d.conv"
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"

    def __post_init__(self) -> None:
        names = vars(self).values()
        if not all(name.count("%d") == 1 for name in names) or len(set(names)) < len(names):
            raise ExportError(
                "every name of a state needs one %d, for the layer, and must differ from the others"
            )


@dataclass
class Program:
    """One graph to be written.

    inputs, outputs: names in order. axes: names of the axes of inputs that must not be frozen, by input.
    """

    exported: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    axes: dict[str, dict[int, str]]
    states: int = 0
    caches: int = 0
    facts: dict[str, str] = field(default_factory=dict)


def is_decoder(model: nn.Module) -> bool:
    """A model that generates from a cache of its own tokens alone."""
    generates = bool(getattr(model, "can_generate", lambda: False)())
    return generates and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def plain(model: nn.Module, inputs: Any) -> Program:
    """One call without a cache: encoders, vision models, any module."""
    examples = example_inputs(model, inputs)
    example = {name: value for name, value in examples[0].items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in without_cache(model, examples[0]).items() if name not in example}
    names: list[str] = []
    shell = _Plain(model, list(example), fixed, names)
    shapes = {name: dict.fromkeys(range(value.ndim), Dim.AUTO) for name, value in example.items()}
    exported = _trace(shell, tuple(example.values()), (tuple(shapes.values()),))
    inputs_ = [f"input_{name}" if name.isdigit() else name for name in example]
    return Program(exported, inputs_, list(names), _free_axes(inputs_, examples))


class _Plain(nn.Module):
    """Tensors in, the floating tensors of the result out; writes their names to `names`."""

    def __init__(
        self, model: nn.Module, order: Sequence[str], fixed: Mapping[str, Any], names: list[str]
    ) -> None:
        super().__init__()
        self.model = model
        self._order, self._fixed, self._names = list(order), dict(fixed), names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self._order, tensors, strict=True))
        found = _named_tensors(call_model(self.model, {**given, **self._fixed}))
        self._names[:] = found
        return tuple(found.values())


def _named_tensors(result: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a model's result by field names, `output_0`, ... where it has none; caches left out."""
    if isinstance(result, Tensor):
        return {name or "output": result}
    if result is None or is_cache(result):
        return {}
    if isinstance(result, Mapping):
        parts = list(result.items())
    elif isinstance(result, (tuple, list)):
        parts = list(enumerate(result))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, part in parts:
        label = f"output_{key}" if isinstance(key, int) and not name else str(key)
        found |= _named_tensors(part, f"{name}.{label}" if name else label)
    return found


def _free_axes(names: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, str]]:
    """Axes that may have any size: the batch, and those in which two examples differ."""
    first = [value for value in examples[0].values() if isinstance(value, Tensor)]
    second = [value for value in examples[-1].values() if isinstance(value, Tensor)]
    axes: dict[str, dict[int, str]] = {}
    for name, one, other in zip(names, first, second, strict=True):
        axes[name] = {0: BATCH} if one.ndim else {}
        for axis in range(1, one.ndim):
            if one.shape[axis] != other.shape[axis]:
                axes[name][axis] = LENGTH
    return axes


def decoder(model: Any, names: StateNames) -> Program:
    """Tokens and states in, logits and states out: prefill, prefill in pieces and decoding in one graph."""
    example = {
        name: value
        for name, value in example_inputs(model)[0].items()
        if name in ("input_ids", "attention_mask")
    }
    if list(example) != ["input_ids", "attention_mask"]:
        raise ExportError(
            f"{type(model).__name__} does not run on input_ids and attention_mask alone; "
            "export_onnx writes decoders of tokens"
        )
    layers = _layers(model, example)
    ids = example["input_ids"]
    batch, length = ids.shape
    mask = torch.ones(batch, _COLUMNS + length, dtype=torch.int64, device=ids.device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: BATCH, 1: LENGTH},
        "attention_mask": {0: BATCH, 1: TOTAL},
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_COLUMNS, _COLUMNS + length, device=ids.device).repeat(batch, 1)
        axes["position_ids"] = {0: BATCH, 1: LENGTH}
    tokens = list(inputs)
    past, before, after = [], [], []
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for index, layer in enumerate(layers):
        if isinstance(layer, StateLayer):
            states = empty(layer._module(), batch, dtype)  # type: ignore[arg-type]
            past.append([state.flat() for state in states])
            for part in range(len(states)):
                more = f".{part}" if part else ""
                before += [names.past_recurrent % index + more, names.past_conv % index + more]
                after += [names.present_recurrent % index + more, names.present_conv % index + more]
        else:
            shape = (batch, layer.keys.shape[1], _COLUMNS)
            kept = (layer.keys, layer.values)
            past.append([tuple(x.new_zeros(*shape, x.shape[3]) for x in kept)])
            before += [names.past_key % index, names.past_value % index]
            after += [names.present_key % index, names.present_value % index]
    flat = [tensor for parts in past for part in parts for tensor in part]
    for name, tensor in zip(before, flat, strict=True):
        growing = name in [names.past_key % i for i in range(len(layers))] + [
            names.past_value % i for i in range(len(layers))
        ]
        axes[name] = {0: BATCH, 2: PAST} if growing else {0: BATCH}
        inputs[name] = tensor
    modules = [layer._module() if isinstance(layer, StateLayer) else None for layer in layers]
    shell = _Decoder(model, tokens, modules, [len(parts) for parts in past])
    shapes = tuple({axis: Dim.AUTO for axis in axes[name]} for name in inputs)
    exported = _trace(shell, tuple(inputs.values()), (shapes,))
    states = sum(module is not None for module in modules)
    return Program(
        exported, list(inputs), ["logits", *after], axes, states=states, caches=len(layers) - states
    )


def _layers(model: Any, example: Mapping[str, Tensor]) -> list[Any]:
    """The cache's layers after one run: states, and keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(**example, past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        known = isinstance(layer, StateLayer) or getattr(layer, "keys", None) is not None
        if not known:
            raise ExportError(
                f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__}, which has no ONNX form"
            )
    return list(cache.layers)


class _Decoder(nn.Module):
    """tokens: names of the first inputs; then the states of every layer: `parts` pairs of tensors each."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[str],
        modules: Sequence[AttentionModule | None],
        parts: Sequence[int],
    ) -> None:
        super().__init__()
        self.model = model
        self._tokens, self._sites, self._parts = list(tokens), list(modules), list(parts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import Cache

        given = dict(zip(self._tokens, tensors, strict=False))
        states = iter(tensors[len(self._tokens) :])
        mask, count = given["attention_mask"], given["input_ids"].shape[1]
        columns = mask.shape[1] - count
        real = mask != 0
        call = Call(real[:, columns:], real[:, :columns].sum(1))
        layers: list[Any] = []
        for module, parts in zip(self._sites, self._parts, strict=True):
            pairs = [(next(states), next(states)) for _ in range(parts)]
            if module is None:
                layers.append(KeyValueLayer(*pairs[0]))
            else:
                layers.append(ExportLayer(module, [Past.of(*pair) for pair in pairs], call, columns))
        result = self.model(**given, past_key_values=Cache(layers=list(layers)), use_cache=True)
        after: list[Tensor] = []
        for layer in layers:
            if isinstance(layer, ExportLayer):
                after += [tensor for past in layer.past for tensor in past.flat()]
            else:
                after += [layer.keys, layer.values]
        return (result[0], *after)


def _trace(shell: nn.Module, tensors: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    """Export, and every core call in it as a node. Raises ExportError."""
    try:
        program = torch.export.export(shell, tensors, dynamic_shapes=shapes, strict=False)
        return program.run_decompositions({torch.ops.linearize.augmented_attention.default: nodes.attention})
    except ExportError:
        raise
    except Exception as error:
        # torch.export raises nearly anything.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch.export cannot trace the model: {type(error).__name__}: {first}") from error
