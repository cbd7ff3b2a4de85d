"""What of a model becomes a graph: which tensors go in and come out, by which names, traced by torch.export.

Nothing here knows an architecture. Which layers keep a state, and which keys and values, is seen in the cache
that one run of the model fills.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from ..cache.lookup import is_cache
from ..cache.state_layer import StateLayer
from ..common.running import call as call_model
from ..common.running import without_cache
from ..convert.inputs import example_inputs
from ..errors import ExportError
from ..mechanisms import available
from ..mechanisms.module import AttentionModule
from ..mechanisms.onnx_form import StateOperator
from ..passes.exporting import no_dumps, undetected_causality, without_cached_shapes
from ..passes.tracing import TRACING
from . import nodes
from .asserted import show_as_nan
from .nodes import Call, Past
from .past import ExportLayer, KeyValueLayer, empty
from .schema import WHOLE

BATCH, LENGTH, TOTAL = "batch_size", "sequence_length", "total_sequence_length"
PAST, ENCODED = "past_sequence_length", "encoder_sequence_length"
_COLUMNS = 7
"""Tokens before the call in the example of a decoder, unlike the batch and the length."""


@dataclass(frozen=True)
class StateNames:
    """Names of a decoder's states in the file, each with one `%d` for the layer.

    The defaults are those of onnxruntime-genai. A mechanism with more than one state in a layer adds `.1`,
    `.2`, ... to the names of the others.

    Attributes:
        past_recurrent: Input of a linear layer: sums over older tokens, float32 [B, Hkv, D, Dv], or what the
            mechanism's own operator has in their place (`onnx/schema.py`).
        past_conv: Input of a linear layer: its last tokens, and those that it keeps, as [key | value],
            [B, Hkv * rows, D + Dv].
        present_recurrent: The output that follows `past_recurrent`.
        present_conv: The output that follows `past_conv`.
        past_key: Input of a softmax layer, [B, Hkv, past, D].
        past_value: Input of a softmax layer, [B, Hkv, past, Dv].
        present_key: The output that follows `past_key`.
        present_value: The output that follows `past_value`.

    Raises:
        ExportError: A name lacks its `%d`, or two are equal.
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
            raise ExportError("each name of a state needs one %d, for the layer, and no two may be equal")


@dataclass
class Program:
    """One graph to be written.

    inputs, outputs: names in order. axes: names of the axes of inputs that must not be frozen, by input.
    states, caches: layers that keep a state, and keys and values.
    """

    exported: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    axes: dict[str, dict[int, str]]
    states: int = 0
    caches: int = 0


def plain(model: nn.Module, inputs: Any) -> Program:
    """One call without a cache: encoders, vision models, any module."""
    examples = example_inputs(model, inputs)
    example = {name: value for name, value in examples[0].items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in without_cache(model, examples[0]).items() if name not in example}
    # Graphs that owners make at their first call are not made inside a trace.
    call_model(model, without_cache(model, examples[0]))
    names: list[str] = []
    shell = _Plain(model, list(example), fixed, names)
    inputs_ = [f"input_{name}" if name.isdigit() else name for name in example]
    axes = _free_axes(inputs_, examples)
    shapes = tuple(
        dict.fromkeys(axes[name] if len(examples) > 1 else _lengths(value), Dim.AUTO)
        for name, value in zip(inputs_, example.values(), strict=True)
    )
    exported = _trace(shell, tuple(example.values()), (shapes,))
    return Program(exported, inputs_, list(names), axes)


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


def _lengths(tensor: Tensor) -> range:
    """Axes that one example may stand for at other sizes; the last one of an activation is its features."""
    return range(tensor.ndim - (tensor.is_floating_point() and tensor.ndim > 2))


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


def decoder(model: Any, names: StateNames, last_logits: bool) -> Program:
    """Tokens and states in, logits and states out: prefill, prefill in pieces and decoding in one graph.

    last_logits: those of the last token alone. Raises ExportError for a model that needs more than tokens,
    or keeps something else than states or keys and values.
    """
    from transformers import DynamicCache

    example = {k: v for k, v in example_inputs(model)[0].items() if isinstance(v, Tensor)}
    if set(example) != {"input_ids", "attention_mask"}:
        raise ExportError(
            f"{type(model).__name__} takes {', '.join(example)}; a decoder is written as a graph of "
            "input_ids and attention_mask alone"
        )
    cache = DynamicCache(config=model.config)
    model(**example, past_key_values=cache, use_cache=True)
    tokens, axes = _tokens(example["input_ids"])
    takes = inspect.signature(model.forward).parameters
    if last_logits and "logits_to_keep" not in takes:
        raise ExportError(f"{type(model).__name__} cannot leave out logits: it takes no logits_to_keep")
    call = partial(_call_decoder, logits_to_keep=1) if last_logits else _call_decoder
    if "position_ids" in takes:
        count = tokens["attention_mask"].shape[1]
        tokens["position_ids"] = (tokens["attention_mask"].cumsum(1) - 1)[:, _COLUMNS:count]
        axes["position_ids"] = {0: BATCH, 1: LENGTH}
    return _stateful(model, call, tokens, axes, cache.layers, names)


def _call_decoder(model: Any, given: Mapping[str, Tensor], layers: Sequence[Any], **more: Any) -> Any:
    from transformers import Cache

    return model(**given, past_key_values=Cache(layers=list(layers)), use_cache=True, **more)


def encoder_of(model: Any) -> Program:
    """The encoder of an encoder-decoder: what it takes in, `last_hidden_state` out."""
    encoder = model.get_encoder()
    takes = inspect.signature(encoder.forward).parameters
    examples = [{k: v for k, v in e.items() if k in takes} for e in example_inputs(model)]
    return plain(encoder, examples)


def decoder_of(model: Any, names: StateNames) -> Program:
    """The decoder of an encoder-decoder: `input_ids`, `attention_mask` [B, past + T], the encoder's output
    `encoder_hidden_states` [B, S, hidden], `encoder_attention_mask` [B, S] where the model takes one, and
    states in; logits and states out. Keys and values of the encoder's output are computed at each call.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    example = {k: v for k, v in example_inputs(model)[0].items() if isinstance(v, Tensor)}
    if "decoder_input_ids" not in example:
        raise ExportError(f"{type(model).__name__} does not take decoder_input_ids")
    config = model.config.get_text_config(decoder=True)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    hidden = model(**example, past_key_values=cache, use_cache=True).encoder_last_hidden_state
    tokens, axes = _tokens(example["decoder_input_ids"])
    tokens["encoder_hidden_states"] = hidden
    axes["encoder_hidden_states"] = {0: BATCH, 1: ENCODED}
    if "attention_mask" in example:
        tokens["encoder_attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.int64)
        axes["encoder_attention_mask"] = {0: BATCH, 1: ENCODED}
    return _stateful(model, _call_decoder_of, tokens, axes, cache.self_attention_cache.layers, names)


def _call_decoder_of(model: Any, given: Mapping[str, Tensor], layers: Sequence[Any]) -> Any:
    from transformers import Cache, DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    more = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=given["encoder_hidden_states"]),
        decoder_input_ids=given["input_ids"],
        decoder_attention_mask=given["attention_mask"],
        past_key_values=EncoderDecoderCache(Cache(layers=list(layers)), DynamicCache()),
        use_cache=True,
        **more,
    )


def _tokens(ids: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example tokens after `_COLUMNS` others, and their mask."""
    mask = ids.new_ones(ids.shape[0], _COLUMNS + ids.shape[1], dtype=torch.int64)
    axes = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: TOTAL}}
    return {"input_ids": ids, "attention_mask": mask}, axes


def _stateful(
    model: Any,
    call: Callable[[Any, Mapping[str, Tensor], Sequence[Any]], Any],
    tokens: dict[str, Tensor],
    axes: dict[str, dict[int, str]],
    layers: Sequence[Any],
    names: StateNames,
) -> Program:
    """layers: those of a cache that the model has filled."""
    batch = tokens["input_ids"].shape[0]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs, modules, parts, after = dict(tokens), [], [], ["logits"]
    for index, layer in enumerate(layers):
        module = layer.module if isinstance(layer, StateLayer) else None
        modules.append(module)
        if module is not None:
            pasts = empty(module, batch, dtype)
            parts.append(len(pasts))
            for part, past in enumerate(pasts):
                more = f".{part}" if part else ""
                for name, tensor in zip((names.past_recurrent, names.past_conv), past.flat(), strict=True):
                    inputs[name % index + more], axes[name % index + more] = tensor, {0: BATCH}
                after += [name % index + more for name in (names.present_recurrent, names.present_conv)]
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ExportError(
                f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__} in its cache, which "
                "has no ONNX form"
            )
        parts.append(1)
        for name, x in ((names.past_key, keys), (names.past_value, values)):
            inputs[name % index] = x.new_zeros(batch, x.shape[1], _COLUMNS, x.shape[3])
            axes[name % index] = {0: BATCH, 2: PAST}
        after += [names.present_key % index, names.present_value % index]
    shell = _Stateful(model, call, list(tokens), modules, parts)
    shapes = tuple(dict.fromkeys(axes[name], Dim.AUTO) for name in inputs)
    exported = _trace(shell, tuple(inputs.values()), (shapes,))
    states = sum(module is not None for module in modules)
    return Program(exported, list(inputs), after, axes, states=states, caches=len(modules) - states)


class _Stateful(nn.Module):
    """tokens: names of the first inputs; then the states of every layer, `parts` pairs of tensors each."""

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Any, Mapping[str, Tensor], Sequence[Any]], Any],
        tokens: Sequence[str],
        sites: Sequence[AttentionModule | None],
        parts: Sequence[int],
    ) -> None:
        super().__init__()
        self.model = model
        self._run = call
        # A tuple: modules in it are not registered a second time.
        self._sites, self._tokens, self._parts = tuple(sites), tuple(tokens), tuple(parts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
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
        result = self._run(self.model, given, layers)
        after: list[Tensor] = []
        for layer in layers:
            if isinstance(layer, ExportLayer):
                after += [tensor for past in layer.past for tensor in past.flat()]
            else:
                after += [layer.keys, layer.values]
        return (result.logits, *after)


def _trace(shell: nn.Module, tensors: tuple[Tensor, ...], shapes: Any) -> ExportedProgram:
    """Export, with every core call as a node. Raises ExportError."""
    # Not views: torch 2.13 writes conditions on the tensor behind one, which it cannot read back.
    tensors = tuple(tensor.clone() for tensor in tensors)
    try:
        with TRACING, without_cached_shapes(), undetected_causality(shell), no_dumps():
            exported = torch.export.export(_AsNodes(shell), tensors, dynamic_shapes=shapes, strict=False)
    except ExportError:
        raise
    except Exception as error:
        # torch.export raises nearly anything.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch.export cannot trace the model: {type(error).__name__}: {first}") from error
    show_as_nan(exported)
    return exported


class _AsNodes(nn.Module):
    """Calls a module with every core call in it replaced by its node."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        with _Nodes():
            return self.module(*tensors)


class _Nodes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.linearize.augmented_attention.default:
            return nodes.attention(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "linearize":
            name = func.name().removeprefix("linearize::")
            if name in WHOLE:
                return _whole(WHOLE[name], *args, **(kwargs or {}))
            raise _no_form(name)
        return func(*args, **(kwargs or {}))


def _whole(operator: StateOperator, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Query [B, Hkv, R, T, D] and what follows of a mechanism's registered operator, as one node."""
    assert operator.whole is not None
    out = nodes.whole(*operator.whole.call(query, *args, **kwargs))
    return out.unflatten(1, (query.shape[1], -1)).float()


def _no_form(name: str) -> ExportError:
    """For a registered operator, called as its mechanism, that is in no file."""
    mechanism = available().get(name)
    if mechanism is not None and mechanism.onnx is not None:
        return ExportError(
            f"the mechanism {name} has an ONNX form with a state only, as in a decoder; leave other layers "
            "as softmax (`keep_softmax=`) or choose another mechanism"
        )
    with_one = " and ".join(m.name for m in available().values() if m.onnx is not None)
    what = "operator" if mechanism is None else "mechanism"
    return ExportError(f"the {what} {name} has no ONNX form; in decoders {with_one} have one")
