"""What the matcher says about a graph: sites, refusals, and the report that holds both.

Everything here is plain data. Nodes are held by reference so that a rewrite can find them; nothing else in
a record depends on torch.fx.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

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
    lengths: the (query, key) lengths at which the mask was evaluated: evidence, not proof, elsewhere.
    leaves: names of the graph inputs, buffers and parameters whose values take part.
    """

    pattern: Pattern
    width: int | None = None
    padding: bool = False
    bias: bool = False
    per_head: bool = False
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
class Operand:
    """A tensor of the site and how to bring it to canonical layout.

    `node` produces a tensor whose axes, permuted by `permute` and then merged, give `[B, H, T, D]`:
    `split[i]` names how many of the permuted axes go into canonical axis i (0 means a new axis of size 1).
    """

    node: Node
    permute: tuple[int, ...]
    split: tuple[int, int, int, int]
    shape: tuple[Size, Size, Size, Size]


@dataclass(frozen=True)
class Step:
    """One step of the score program, in execution order between `q @ k^T` and softmax.

    kind is one of `scale` (value), `cap` (value: softcap c, c*tanh(s/c)), `add` (term), `fill` (term: bool,
    True is masked; value), `keep` (term: bool, True is visible; value), `cast` (value: dtype name),
    `causal` (top-left aligned lower triangle), `sink` (term: one logit per head; value "first" or "last").
    `term` is a graph node broadcastable to `[B, H, T, S]` after `layout`-reshaping, None for scalar steps.
    """

    kind: str
    value: Any = None
    term: Node | None = None


@dataclass(frozen=True)
class Site:
    """One proved attention: `output = softmax(program(query @ key^T)) @ value`.

    path: dotted path of the owner, the lowest module that holds both contractions and the softmax ("" = root).
    ordinal: 0, 1, ... for several sites (or several calls) of the same owner, in execution order.
    query, key, value: operands; key and value are *before* any repeat of grouped heads.
    output: the node the canonical call replaces; output_permute/output_sizes bring `[B, H, T, Dv]` to its layout.
    program: the exact score program. scale: the product of the scalar scales, None if it is a tensor.
    layer_index: filled by the planner, not the matcher.
    """

    path: str
    ordinal: int
    anchor: Node
    query: Operand
    key: Operand
    value: Operand
    output: Node
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
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Size]:
        """B, H, Hkv, T (queries), S (keys), D (query/key features), Dv (value features)."""
        b, h, t, d = self.query.shape
        _, hkv, s, _ = self.key.shape
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
