"""What the matcher says about a graph: sites, refusals, and the report that holds both.

Everything here is plain data. Nodes are held by reference so that a rewrite can find them; nothing else in
a record depends on torch.fx.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import GraphModule, Node

Size = int | str
"""A dimension: an int when static, the symbol's text (for example `s27`) when dynamic."""


class Reason(str, enum.Enum):
    """Why a candidate was refused. The value is the public reason code, and compares equal to it."""

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

    Attributes:
        reason: The reason code.
        message: One sentence for a human.
        node: The node that could not be explained.
        anchor: The softmax or fused node from which the walk started.
        reached: The stage or step that the walk had come to.
        path: Dotted path of the module that computes the anchor; "" for the root.
        ordinal: 0; the passes number sites, not refusals.
        source: `file.py:line` of the anchor; "" where the tracer kept none.
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
    PREFIX = "prefix"  # causal, and every query sees the first keys, `width` of them where that is a number
    OTHER = "other"


@dataclass(frozen=True)
class Mask:
    """What the mask of a site means, read from the graph: it holds at every length and for every input.

    Attributes:
        pattern: The positional part.
        width: The parameter of the pattern in tokens; None for full, causal and other.
        padding: Whether a predicate of the key alone switches keys off, the same for every query.
        own_column: Whether that predicate reads inputs at the key's own column only, so that it can be asked
            of new tokens alone.
        documents: Whether a query sees only keys of its own document: tokens that share a value which inputs
            decide.
        bias: Whether finite values other than zero are added to visible scores.
        per_head: Whether the mask differs from head to head.
        top_left: Query i stands at key i although there may be more keys; otherwise the last query stands
            at the last key.
        leaves: Names of the graph inputs, buffers and parameters whose values take part.
        why: What about the mask no pattern says; "" where the pattern is all.
        inputs: The graph inputs that decide it, or that tell documents apart.
        zero_or_one: Integer inputs that are multiplied by a huge number; the reading holds for zero and one.
        given: What no pattern says is a mask that the caller gives: an input with an entry for each query and
            key, beside inputs that say something of keys.
    """

    pattern: Pattern
    width: int | None = None
    padding: bool = False
    own_column: bool = True
    documents: bool = False
    bias: bool = False
    per_head: bool = False
    top_left: bool = False
    leaves: tuple[str, ...] = ()
    why: str = ""
    inputs: tuple[str, ...] = ()
    zero_or_one: tuple[str, ...] = ()
    given: bool = False

    @property
    def label(self) -> str:
        """The mask in a word, for example `window(128)+padding`."""
        text = self.pattern.value if self.width is None else f"{self.pattern.value}({self.width})"
        return "+".join([text, *(name for name in ("padding", "documents", "bias") if getattr(self, name))])


class KVKind(str, enum.Enum):
    """Which key/value head a query head reads."""

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
    """Data movement between two layouts, in five moves.

    Reshape to `split`, permute by `order`, reshape to `spread`, expand to `full`, reshape to `merged`. Sizes
    are sympy expressions over the symbols of the graph.
    """

    split: tuple[sympy.Expr, ...]
    order: tuple[int, ...]
    spread: tuple[sympy.Expr, ...]
    full: tuple[sympy.Expr, ...]
    merged: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor of the site and how to bring it to canonical layout.

    That is `[B, H, T, D]` for the query, `[B, Hkv, S, D]` for the key, `[B, Hkv, S, Dv]` for the value; a
    score term broadcasts to `[B, H, T, S]`.

    Attributes:
        node: The tensor in the graph.
        relayout: The data movement to canonical layout.
    """

    node: Node
    relayout: Relayout

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape in canonical layout."""
        return tuple(int(s) if s.is_Integer else str(s) for s in self.relayout.merged)


@dataclass(frozen=True)
class Step:
    """One step of the program, in execution order from `q @ k^T` to the weights that multiply v.

    A fused node is the single step `sdpa`.

    Attributes:
        kind: What happens to the scores or weights:

            - `scale`, `div`: times, or divided by, the value; element by element where there is a term.
            - `offset`: plus the value. `add`: plus the value times the term.
            - `fill`, `keep`: the value is written where the bool term is True (`fill`) or False (`keep`).
            - `causal`: the lower triangle, aligned at the top left.
            - `tanh`. `cast`: to the dtype that the value names.
            - `sink`: the term is joined on as one column of logits, "first" or "last" by the value.
              `drop_sink`: that column is cut off again.
            - `softmax`: over the keys, in the dtype that the value names, if any. `safe_softmax`: rows that
              are fully masked give zero.
            - `dropout`: with probability value. `nan_to_num`.
            - `sdpa`: the value holds "scale", "causal" and "dropout"; the term is the mask.
        value: The constant that belongs to the step.
        term: The tensor that belongs to the step.
    """

    kind: str
    value: Any = None
    term: Operand | None = None

    @property
    def is_gate(self) -> bool:
        """Whether it multiplies key by key, by zero or one: half of a mask like `s * m - 1e4 * (1 - m)`."""
        return self.kind in ("scale", "div") and self.term is not None and self.term.relayout.merged[3] != 1


def term_operands(program: Sequence[Step]) -> list[Operand]:
    """The terms of a program, in order."""
    return [step.term for step in program if step.term is not None]


@dataclass(frozen=True)
class Site:
    """One proved attention: `output = softmax(program(query @ key^T)) @ value`.

    Attributes:
        path: Dotted path of the owner, the lowest module that holds both contractions and the softmax; ""
            for the root.
        ordinal: 0, 1, ... over the sites of one owner in execution order.
        anchor: The softmax or fused node.
        query: Operand `[B, H, T, D]`.
        key: Operand `[B, Hkv, S, D]`, before grouped heads are repeated, where the repeat can be peeled off.
        value: Operand `[B, Hkv, S, Dv]`, as the key.
        output: The node that the canonical call replaces.
        restore: The data movement from `[B, H, T, Dv]` to the layout of the output.
        program: The exact steps from the scores to the weights.
        mask: What the program hides.
        scale: Product of the constant scales on the scores; None where one is a tensor, as a scale learned
            per head.
        softcap: c of `c * tanh(s / c)`, if there is one.
        sinks: Whether a column of sink logits takes part in the softmax.
        kv_map: How the query heads share key/value heads.
        dropout: Probability in this graph.
        score_dtype: Name of the dtype in which the softmax runs.
        body: The nodes that the canonical call makes unnecessary.
        spelling: Fingerprint such as `matmul>scale>add>softmax>matmul`.
        source: `file.py:line` of the anchor; "" where the tracer kept none.
        owner_type: Class name of the owner.
        call: In which call of the owner the site is, 0 for the first.
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
        """Sizes by letter: B, H, Hkv, T (queries), S (keys), D (query/key features), Dv (value features)."""
        b, h, t, d = self.query.shape
        hkv, s = self.key.shape[1], self.key.shape[2]
        return {"B": b, "H": h, "Hkv": hkv, "T": t, "S": s, "D": d, "Dv": self.value.shape[3]}

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.mask.pattern in (Pattern.CAUSAL, Pattern.WINDOW, Pattern.CHUNK)

    @property
    def cross(self) -> bool:
        """Whether queries and keys have lengths that are not known to be equal."""
        return self.query.shape[2] != self.key.shape[2]


@dataclass(frozen=True)
class MatchReport:
    """Every candidate of one graph.

    Attributes:
        graph_module: The pre-dispatch ATen graph whose nodes the records name.
        sites: The candidates that are proved, in execution order.
        refusals: The candidates that are left alone, each with its reason.
    """

    graph_module: GraphModule
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
