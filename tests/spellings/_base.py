"""What a spelling is, the owner most of them share, and the slow reference that proves their facts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from linearize.passes.exporting import without_cached_shapes
from torch import Tensor, nn
from torch.export import Dim

HEADS, DIM, WIDTH = 4, 8, 32  # query heads, features per head, model width = HEADS * DIM
LONGEST = 48  # buffers (masks, position tables) reach this many tokens

TRACED = (3, 7)  # (batch, length) of the capture: sizes that nothing else in the models has
UNTRACED = (5, 11)

REGISTRY: dict[str, Spelling] = {}

# How each named input is made, and which of its axes are dynamic. A spelling lists the names it takes.
AXES: dict[str, dict[int, str]] = {
    "x": {0: "batch", 1: "length"},
    "keep": {0: "batch", 1: "length"},
    "memory": {0: "batch", 1: "keys"},
    "memory_keep": {0: "batch", 1: "keys"},
    "past_key": {0: "batch", 2: "past"},
    "past_value": {0: "batch", 2: "past"},
    "causal_mask": {2: "length", 3: "length"},
    "bool_mask": {0: "length", 1: "length"},
    "alibi": {0: "batch_heads", 2: "length"},
}


@dataclass(frozen=True)
class Facts:
    """What a matcher must say about a spelling. Checked twice: against `reference`, and on the record.

    mask: `Mask.label`; top_left: its diagonal starts at key 0 although there are more keys than queries.
    label: what the graph alone can know of it, where that is less (the mask is an input of arbitrary values);
    "a|b" where either is right.
    scale: product of all scalar scales, or "tensor" when one of them is a tensor. operand_scale: the part of
    it that is applied to q or k before the contraction, which belongs to the operands, not to the program.
    kv: (kind, groups). cross: query and key lengths differ (None: at some). sites: how many, at `paths`.
    Biases and tensor scales reach the reference through `owner.adjust(scores, head, inputs, q, k)`.
    """

    mask: str = "full"
    label: str | None = None
    top_left: bool = False
    scale: float | str = DIM**-0.5
    operand_scale: float = 1.0
    softcap: float | None = None
    sinks: bool = False
    kv: tuple[str, int] = ("equal", 1)
    heads: int = HEADS
    dim: int = DIM
    value_dim: int = DIM
    cross: bool | None = False
    dropout: float = 0.0
    sites: int = 1
    paths: tuple[str, ...] = ("attn",)

    @property
    def kv_heads(self) -> int:
        return self.heads // self.kv[1]


@dataclass(frozen=True)
class Spelling:
    """One way to write attention (facts) or something that looks like it (reasons).

    reasons: the refusal codes that are right for a decoy. With `facts` as well, the matcher may also accept
    it, provided that the facts hold and the rewrite is exact. may_be_silent: has no softmax, so no candidate
    is owed. culprit: a fragment of the culprit node's name or target. fx: torch.fx.symbolic_trace can trace
    it. dynamic_length: the length may be dynamic. reference: `reference` can compute it.
    """

    name: str
    axis: str
    owner: Callable[[], nn.Module]
    inputs: tuple[str, ...] = ("x",)
    facts: Facts | None = None
    reasons: tuple[str, ...] = ()
    culprit: str = ""
    may_be_silent: bool = False
    fx: bool = True
    dynamic_length: bool = True
    dynamic_batch: bool = True
    training: bool = False
    double: bool = True
    reference: bool = True
    lengths: tuple[tuple[int, int], tuple[int, int]] = (TRACED, UNTRACED)

    def model(self, seed: int = 0) -> Net:
        """The spelling inside a residual block, with weights large enough that scale and cap matter."""
        torch.manual_seed(seed)
        net = (Net, Net2, Net3)[len(self.inputs) - 1](self.owner())
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return net.train(self.training)

    def example(
        self, batch: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> dict[str, Tensor]:
        """Named inputs. Keys with a length of their own are `length + 5` long; padding is on the right."""
        generator = torch.Generator().manual_seed(seed + 100 * length + batch)
        return {name: make_input(name, batch, length, dtype, generator) for name in self.inputs}

    def dynamic_shapes(self) -> tuple[dict[int, Dim], ...]:
        """`torch.export` dynamic shapes of the positional inputs.

        Batch and key axes of one name share one symbol, which export does not discover for itself; lengths
        are left to it, because buffers and comparisons bound them.
        """
        held = set() if self.dynamic_length else {"length", "past", "keys"}
        if not self.dynamic_batch:
            held |= {"batch", "batch_heads"}
        dims = {name: Dim(name, min=2) for name in ("batch", "past", "keys")}
        dims["length"] = Dim.DYNAMIC
        return tuple({a: dims[d] for a, d in AXES[name].items() if d not in held} for name in self.inputs)

    def export(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.fx.GraphModule:
        """The pre-dispatch ATen graph, traced at the first of `lengths`."""
        args = tuple(self.example(*self.lengths[0], dtype=dtype).values())
        with torch.no_grad(), without_cached_shapes():
            program = torch.export.export(model, args, dynamic_shapes=self.dynamic_shapes(), strict=False)
        return program.module(check_guards=False)


def make_input(name: str, batch: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    keys = length + 5

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def keep(count: int) -> Tensor:
        real = torch.arange(batch) % 3 + count - 2
        return torch.arange(count) < real.unsqueeze(1)

    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    match name:
        case "x":
            return noise(batch, length, WIDTH)
        case "keep":
            return keep(length)
        case "memory":
            return noise(batch, keys, WIDTH)
        case "memory_keep":
            return keep(keys)
        case "past_key" | "past_value":
            return noise(batch, HEADS, keys, DIM)
        case "causal_mask":
            return torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(~triangle, -math.inf)
        case "bool_mask":
            return ~triangle
        case "alibi":
            slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=dtype)
            rows = slopes[:, None, None] * torch.arange(length, dtype=dtype)
            return rows.repeat(batch, 1, 1)
    raise KeyError(name)


class Net(nn.Module):
    """A residual block around the owner, so that owners are found at `attn` and both receive gradients."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = owner

    def block(self, x: Tensor, *extra: Tensor) -> Tensor:
        result = self.attn(self.norm(x), *extra)
        if isinstance(result, tuple):  # decoys that return more than their output
            return (x + result[0], *result[1:])
        return x + result

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Net2(Net):
    """Two inputs. A class each because torch.fx cannot unpack `*inputs`."""

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        return self.block(x, a)


class Net3(Net):
    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.block(x, a, b)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]"""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]"""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * dim)


def causal_mask(q: Tensor) -> Tensor:
    """[T, T] in the dtype of q [B, H, T, D]: -inf above the diagonal."""
    t = q.shape[-2]
    return torch.full((t, t), -math.inf).triu(1).to(q.dtype)


class Attention(nn.Module):
    """Separate q, k, v and output projections around a core function `core(self, q, k, v, *extra)`.

    layout "bhtd": the core sees and returns [B, H, T, D]. "flat": it sees and returns [B, T, H * D].
    `setup(self)` registers what the core needs. With `memory` as first extra input, keys and values come
    from it.
    """

    def __init__(
        self,
        core: Callable[..., Tensor],
        *,
        inputs: tuple[str, ...] = ("x",),
        layout: str = "bhtd",
        heads: int = HEADS,
        kv_heads: int = HEADS,
        dim: int = DIM,
        value_dim: int = DIM,
        setup: Callable[[Attention], None] | None = None,
    ) -> None:
        super().__init__()
        self.core, self.inputs, self.layout = core, inputs, layout
        self.heads, self.kv_heads, self.dim, self.value_dim = heads, kv_heads, dim, value_dim
        self.cross = "memory" in inputs
        self.q_proj = nn.Linear(WIDTH, heads * dim)
        self.k_proj = nn.Linear(WIDTH, kv_heads * dim)
        self.v_proj = nn.Linear(WIDTH, kv_heads * value_dim)
        self.o_proj = nn.Linear(heads * value_dim, WIDTH)
        if setup is not None:
            setup(self)

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        source = x
        if self.cross:
            source, *rest = extra
            extra = tuple(rest)
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        if self.layout == "flat":
            return self.o_proj(self.core(self, q, k, v, *extra))
        q, k, v = split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)
        return self.o_proj(merge(self.core(self, q, k, v, *extra)))

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's [B, H, T, D], [B, Hkv, S, D], [B, Hkv, S, Dv]."""
        source = named["memory"] if self.cross else named["x"]
        q = split(self.q_proj(named["x"]), self.heads)
        k = split(self.k_proj(source), self.kv_heads)
        v = split(self.v_proj(source), self.kv_heads)
        if "past_key" in named:
            k = torch.cat([named["past_key"], k], 2)
            v = torch.cat([named["past_value"], v], 2)
        return q, k, v

    def finish(self, out: Tensor) -> Tensor:
        return self.o_proj(merge(out))


def spelling(
    axis: str, *, facts: Facts | None = None, reasons: tuple[str, ...] = (), **options: object
) -> Callable:
    """Register the decorated core function (or owner class) under its own name.

    A function becomes the core of `Attention`; a class is used as the owner. Options of `Attention` and of
    `Spelling` may be mixed. A spelling with neither facts nor reasons has the default facts.
    """
    ours = {"layout", "kv_heads", "dim", "value_dim", "setup", "heads"}
    owner_options = {key: options.pop(key) for key in list(options) if key in ours}
    if facts is None and not reasons:
        facts = Facts()

    def register(target: Callable) -> Callable:
        name = target.__name__
        if name in REGISTRY:
            raise ValueError(f"spelling {name} exists")
        inputs = options.get("inputs", ("x",))
        if isinstance(target, type):
            owner: Callable[[], nn.Module] = target
        else:
            heads = {"kv_heads": facts.kv_heads, "heads": facts.heads} if facts else {}
            sizes = {"dim": facts.dim, "value_dim": facts.value_dim} if facts else {}

            def owner() -> nn.Module:
                return Attention(target, inputs=inputs, **{**heads, **sizes, **owner_options})

        REGISTRY[name] = Spelling(name, axis, owner, facts=facts, reasons=reasons, **options)
        return target

    return register


def visible(facts: Facts, queries: int, keys: int) -> Tensor:
    """Boolean [T, S] of a positional pattern; the last query sits at the last key unless top_left."""
    pattern = facts.mask.split("+")[0]
    i = torch.arange(queries).unsqueeze(1) + (0 if facts.top_left else keys - queries)
    j = torch.arange(keys)
    width = int(pattern[pattern.index("(") + 1 : -1]) if "(" in pattern else 0
    match pattern.split("(")[0]:
        case "full":
            return torch.ones(queries, keys, dtype=torch.bool)
        case "causal":
            return j <= i
        case "window":
            return (j <= i) & (i - j < width)
        case "band":
            return (i - j).abs() <= width
        case "chunk":
            return (j <= i) & (i // width == j // width)
        case "other":  # the only one in this library: a query sees itself and what follows
            return j >= i
    raise ValueError(pattern)


def reference(entry: Spelling, net: Net, named: dict[str, Tensor]) -> Tensor:
    """The block's output by the facts alone: loops over heads, one softmax row at a time, nothing fused."""
    facts, owner = entry.facts, net.attn
    assert facts is not None
    inner = {**named, "x": net.norm(named["x"])}
    q, k, v = owner.operands(inner)
    batch, heads, queries, _ = q.shape
    groups = facts.kv[1]
    assert heads == facts.heads and k.shape[1] == facts.kv_heads
    rows = []
    seen = visible(facts, queries, k.shape[2])
    for h in range(heads):
        g = h if groups == 1 else (h % facts.kv_heads if facts.kv[0] == "tiled" else h // groups)
        scores = torch.einsum("btd,bsd->bts", q[:, h], k[:, g])
        if isinstance(facts.scale, float):
            scores = scores * facts.scale
        if facts.softcap is not None:
            scores = facts.softcap * torch.tanh(scores / facts.softcap)
        if hasattr(owner, "adjust"):  # bias, tensor scales: [B or 1, T, S] of one head
            scores = owner.adjust(scores, h, inner, q, k)
        allowed = seen.expand(batch, -1, -1)
        if "padding" in facts.mask:
            keep = named.get("memory_keep", named.get("keep"))
            allowed = allowed & keep[:, None, :]
        scores = scores.masked_fill(~allowed, -math.inf)
        if facts.sinks:
            column = owner.sinks[h].expand(batch, queries, 1)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., : k.shape[2]]
        rows.append(torch.einsum("bts,bsd->btd", weights, v[:, g]))
    return named["x"] + owner.finish(torch.stack(rows, 1))
