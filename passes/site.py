"""What the matcher says about a graph: sites, refusals, and the report that holds both.

Everything here is plain data. Nodes are held by reference so that a rewrite can find them; nothing else in
a record depends on torch.fx.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import GraphModule, Node

Size = int | str
"""A dimension: an int when static, the symbol's text (for example `s27`) when dynamic."""


class Reason(str, enum.Enum):
    """Why a candidate was refused. The value is the public reason code."""

    NOT_ATTENTION = "not-attention"
    WEIGHTS_ESCAPE = "weights-escape"
    SOFTMAX_AXIS = "softmax-axis"
    SCORE_STEP = "score-step"
    VALUE_STEP = "value-step"
    HEAD_MIXING = "head-mixing"
    AXES = "axes"
    KV_MAP = "kv-map"
    SCALE = "scale-not-foldable"
    MASK_UNKNOWN = "mask-unknown"
    MASK_DATA_DEPENDENT = "mask-data-dependent"
    MASK_UNSUPPORTED = "mask-unsupported"
    BIAS_UNSUPPORTED = "bias-unsupported"
    SOFTCAP_UNSUPPORTED = "softcap-unsupported"
    SINKS_UNSUPPORTED = "sinks-unsupported"
    MUTATION = "mutation"
    SHAPE_UNKNOWN = "shape-unknown"
    DROPOUT = "dropout"
    FLEX = "flex-unsupported"
    OWNER = "owner"
    NOT_VERIFIED = "not-verified"


@dataclass(frozen=True)
class Refusal:
    """A candidate that was left untouched.

    `node` is the culprit, `anchor` the softmax or fused node the walk started from, `reached` the name of the
    stage or step the walk had come to, `message` one sentence for a human.
    """

    reason: Reason
    message: str
    node: Node
    anchor: Node
    reached: str
    path: str = ""
    ordinal: int = 0
    source: str = ""


class Pattern(str, enum.Enum):
    """The positional part of a mask: which keys a query may see, ignoring padding."""

    FULL = "full"
    CAUSAL = "causal"
    WINDOW = "window"  # causal and the last `width` keys, itself included
    BAND = "band"  # |i - j| <= width
    CHUNK = "chunk"  # causal and the same chunk of `width` keys
    OTHER = "other"


@dataclass(frozen=True)
class Mask:
    """What the mask of a site means, by evaluation.

    pattern: positional part. width: its parameter in tokens (None for full, causal, other).
    padding: a key-padding input takes part (keys switched off by data, the same for every query).
    bias: finite non-zero values are added to visible scores. per_head: they, or the mask, differ by head.
    top_left: query i stands at key i although there may be more keys (else the last query at the last key).
    lengths: the (query, key) lengths at which the mask was evaluated: evidence, not proof, elsewhere.
    leaves: names of the graph inputs, buffers and parameters whose values take part.
    """

    pattern: Pattern
    width: int | None = None
    padding: bool = False
    bias: bool = False
    per_head: bool = False
    top_left: bool = False
    lengths: tuple[tuple[int, int], ...] = ()
    leaves: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        text = self.pattern.value if self.width is None else f"{self.pattern.value}({self.width})"
        return "+".join([text, *(["padding"] if self.padding else []), *(["bias"] if self.bias else [])])


class KVKind(str, enum.Enum):
    EQUAL = "equal"  # one key/value head per query head
    INTERLEAVED = "interleaved"  # query head h reads kv head h // groups (transformers' repeat_kv)
    TILED = "tiled"  # query head h reads kv head h % num_key_value_heads


@dataclass(frozen=True)
class KVMap:
    """How query heads share key/value heads; `groups` = query heads per key/value head."""

    kind: KVKind
    groups: int


@dataclass(frozen=True)
class Relayout:
    """Data movement between two layouts: reshape to `split`, permute by `order`, reshape to `spread`,
    expand to
    `full`, reshape to `merged`. Sizes are sympy expressions over the graph's symbols."""

    split: tuple[sympy.Expr, ...]
    order: tuple[int, ...]
    spread: tuple[sympy.Expr, ...]
    full: tuple[sympy.Expr, ...]
    merged: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor of the site and how to bring it to canonical layout.

    query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`, score terms broadcastable to `[B,
    H, T, S]`.
    """

    node: Node
    relayout: Relayout

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(int(s) if s.is_Integer else str(s) for s in self.relayout.merged)


@dataclass(frozen=True)
class Step:
    """One step of the program, in execution order from `q @ k^T` to the weights that multiply v.

    kind is one of
    `scale`, `div` (by value, or element-wise by term), `tanh`, `offset` (add value),
    `add` (value times term), `fill` (where bool term is True write value), `keep` (where it is False write
    value), `causal` (top-left aligned lower triangle), `cast` (value: dtype name),
    `sink` (term: logits prepended or appended as a column, value "first" or "last"),
    `softmax` (value: dtype name or None; over the keys), `safe_softmax` (fully masked rows give zero),
    `drop_sink`, `dropout` (value: p), `nan_to_num`;
    a fused node is the single step `sdpa` (value: {"scale", "causal", "dropout"}, term: its mask).
    """

    kind: str
    value: Any = None
    term: Operand | None = None


@dataclass(frozen=True)
class Site:
    """One proved attention: `output = softmax(program(query @ key^T)) @ value`.

    path: dotted path of the owner, the lowest module that holds both contractions and the softmax ("" =
    root).
    ordinal: 0, 1, ... over the sites of one owner in execution order; call: which call of the owner it is in.
    query, key, value: operands; key and value are *before* any repeat of grouped heads where that can be
    peeled. output: the node the canonical call replaces; `restore` brings `[B, H, T, Dv]` to its layout.
    program: the exact steps. mask: what they mean, by evaluation.
    scale: product of the constant scales on the scores, None if one is a tensor (a per-head learned scale).
    softcap: c of `c * tanh(s / c)`. dropout: p in this trace. score_dtype: dtype in which softmax runs.
    body: the nodes the canonical call makes unnecessary. spelling: fingerprint such as
    `matmul>scale>add>softmax>matmul`. source: `file.py:line` of the anchor.
    """

    path: str
    ordinal: int
    anchor: Node
    query: Operand
    key: Operand
    value: Operand
    output: Node
    restore: Relayout
    program: tuple[Step, ...]
    mask: Mask
    scale: float | None
    softcap: float | None
    sinks: bool
    kv_map: KVMap
    dropout: float
    score_dtype: str
    body: tuple[Node, ...]
    spelling: str
    source: str
    owner_type: str = ""
    call: int = 0

    @property
    def shapes(self) -> dict[str, Size]:
        """B, H, Hkv, T (queries), S (keys), D (query/key features), Dv (value features)."""
        b, h, t, d = self.query.shape
        hkv, s = self.key.shape[1], self.key.shape[2]
        return {"B": b, "H": h, "Hkv": hkv, "T": t, "S": s, "D": d, "Dv": self.value.shape[3]}

    @property
    def causal(self) -> bool:
        return self.mask.pattern in (Pattern.CAUSAL, Pattern.WINDOW, Pattern.CHUNK)

    @property
    def cross(self) -> bool:
        """Queries and keys have lengths that are not known to be equal."""
        return self.query.shape[2] != self.key.shape[2]


@dataclass(frozen=True)
class MatchReport:
    """Every candidate of one graph: `sites` proved, `refusals` left alone with a reason.

    graph_module: the pre-dispatch ATen graph whose nodes the records refer to.
    """

    graph_module: GraphModule
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
