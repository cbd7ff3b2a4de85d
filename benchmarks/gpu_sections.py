"""What `benchmarks/gpu.py` times: both sides in one process, turn by turn, medians of CUDA events.

Before each sample the L2 cache is overwritten, as other layers of a model would, for longer than the host
needs to enqueue the call: sequences are timed by their kernels, not by Python. Decoding is timed twice:
"eager" is wall time, Python included, as a token costs without a CUDA graph, and "graph" replays one. A
dry run takes the torch form on the CPU at tiny sizes: its figures mean nothing, but every line has run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measured import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from linearize.ops import attention as ops

GROUP, TAPS = 64, 32
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
GOALS = {2048: 2.3, 8192: 7.0, 32768: 25.0}
"""Against flash attention, forward, at B8 H32 D128 in bf16."""
CLOSE = 1e-2
"""Of bf16 against the torch form, over whole tensors."""
SLOWEST = 4000
"""Milliseconds: a side that would take longer, by its last length, is not run."""
_L2 = 256 << 20
_MANY = 32

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of one call, or None and the reason; peak: bytes allocated beyond the inputs."""

    ms: float | None
    note: str = ""
    runs: int = 0
    peak: int = 0

    def per(self, calls: int) -> Timed:
        return Timed(None if self.ms is None else self.ms / calls, self.note, self.runs)


class Gpu:
    """Times and memory of a CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(_L2, dtype=torch.int8, device="cuda")

    def sample(self, call: Call) -> float:
        """Milliseconds of one call's kernels after the L2 cache was overwritten."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(10):  # about a millisecond
            self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def wall(self, call: Call) -> float:
        """Milliseconds of one call among many, Python included."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_MANY):
            call()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / _MANY

    def peak(self, call: Call) -> int:
        """Bytes that one call allocates at most."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graphed(self, call: Call, times: int = 1) -> Call:
        """`times` calls as one replay of a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


class Host:
    """The same of a dry run on the CPU."""

    name = "cpu"

    def sample(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)

    wall = sample

    def peak(self, call: Call) -> int:
        call()
        return 0

    def graphed(self, call: Call, times: int = 1) -> Call:
        return lambda: [call() for _ in range(times)]

    def empty_cache(self) -> None:
        pass


class Bench:
    """Inputs, timing, and which kernels may be timed."""

    def __init__(self, refused: dict[str, str], checked: list[str], dry: bool = False) -> None:
        self._refused, self._checked = refused, set(checked)
        self.dry = dry
        self.device: Gpu | Host = Host() if dry else Gpu()
        self.form = "torch" if dry else "triton"

    def refusal(self, kernels: tuple[str, ...], dim: int) -> str:
        """Why these kernels may not be timed in bf16; "" when they may."""
        return "" if self.dry else refusal(kernels, dim, self._refused, self._checked)

    def rows(self, batch: int, heads: int, length: int, dim: int) -> Tensor:
        """[B, H, T, D] in bf16, laid out as models do: [B, T, H, D]."""
        x = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16, device=self.device.name)
        return x.transpose(1, 2)

    def tables(self, heads: int) -> tuple[Tensor, Tensor]:
        """alpha, conv_weight"""
        alpha = torch.rand(heads, device=self.device.name) + 0.5
        return alpha, torch.randn(heads, TAPS, device=self.device.name) * 0.2

    def compare(self, sides: dict[str, Call], seconds: float = 1.0, wall: bool = False) -> dict[str, Timed]:
        """Each side's median, measured turn by turn; a side that raises is left out with the reason.

        wall: time the host's work too.
        """
        sample = self.device.wall if wall else self.device.sample
        out: dict[str, Timed] = {}
        running, samples, peaks = {}, {}, {}
        for name, call in sides.items():
            try:
                call()  # compiles
                peaks[name] = self.device.peak(call)
                samples[name] = [sample(call)]
                running[name] = call
            except Exception as error:  # others' code, on shapes it may not know: its reason is the figure
                out[name] = Timed(None, reason(error))
                self.device.empty_cache()
        # A very slow side is not repeated: its first figure is its figure.
        repeated = {name: call for name, call in running.items() if samples[name][0] < SLOWEST / 4}
        once = sum(samples[name][0] for name in repeated) * (_MANY if wall else 1)
        rounds = 2 if self.dry else max(2, min(50, int(1000 * seconds / (once + 1e-3))))
        for _ in range(rounds):
            for name, call in repeated.items():
                samples[name].append(sample(call))
        for name, taken in samples.items():
            kept = taken[1:] or taken
            out[name] = Timed(statistics.median(kept), "", len(kept), peaks[name])
        return {name: out[name] for name in sides}

    def replay(self, sides: dict[str, tuple[Call, int]], seconds: float = 1.0) -> dict[str, Timed]:
        """`compare` on CUDA graphs of so many calls each; milliseconds of one call."""
        graphs, out = {}, {}
        for name, (call, times) in sides.items():
            try:
                graphs[name] = self.device.graphed(call, times)
            except Exception as error:  # what cannot be captured is said, the other side still measured
                out[name] = Timed(None, reason(error))
        timed = self.compare(graphs, seconds)
        out |= {name: item.per(sides[name][1]) for name, item in timed.items()}
        return {name: out[name] for name in sides}


def refusal(kernels: tuple[str, ...], dim: int, refused: dict[str, str], checked: set[str]) -> str:
    """Why not to time kernels in bf16, by the checks that failed (and how) and those that were made."""
    for kernel in kernels:
        name = f"{kernel}/bfloat16/D{dim}/G{GROUP}"
        if name in refused:
            return f"not timed, {name} failed: {refused[name]}"
        if name not in checked:
            return f"not timed, {name} was not checked"
    return ""


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def softmax(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa)


def lines(
    section: str, case: str, ours: str, timed: dict[str, Timed], goals: dict[str, float], **details: Any
) -> Iterator[Row]:
    """One row for each other side."""
    mine = timed[ours]
    for theirs, other in timed.items():
        if theirs != ours:
            measured = dict(ours_runs=mine.runs, theirs_runs=other.runs)
            measured |= dict(ours_peak_bytes=mine.peak, theirs_peak_bytes=other.peak)
            note = mine.note or other.note
            if mine.peak and other.peak and not note:
                note = f"peak {mine.peak / 1e6:.0f} MB, theirs {other.peak / 1e6:.0f} MB"
            goal = goals.get(theirs)
            yield Row(section, case, ours, theirs, mine.ms, other.ms, goal, note, {**details, **measured})


# ------------------------------------------------------------------------------------- whole sequences


def sequences(
    bench: Bench, section: str, batch: int, heads: int, dim: int, lengths: list[int], training: bool
) -> Iterator[Row]:
    """One shape at growing lengths against SDPA, each checked at its size against the torch form."""
    shape = f"B{batch} H{heads} D{dim}"
    if bench.dry:
        batch, heads, lengths = 1, 2, [64, 128]
    last: dict[str, tuple[int, float]] = {}
    """Tokens and milliseconds of the other sides."""
    kernels = ("forward", "backward") if training else ("forward",)
    if section == "long":
        kernels += tuple(f"{name}_split" for name in kernels)
    for length in lengths:
        case = f"{shape} T={length}" + (" fwd+bwd" if training else "")
        details = dict(shape=shape, length=length, dim=dim, training=training)
        refusal = bench.refusal(kernels, dim)
        try:
            inputs = Sequence(bench, batch, heads, length, dim, training)
            refusal = refusal or inputs.wrong()
        except torch.OutOfMemoryError:
            yield Row(section, case, bench.form, "", note="does not fit in memory", details=details)
            bench.device.empty_cache()
            return
        except Exception as error:  # a kernel that fails at this size may not at others
            refusal = f"not timed, {reason(error)}"
        if refusal:
            yield Row(section, case, bench.form, "SDPA flash", note=refusal, details=details)
            continue
        sides: dict[str, Call] = {bench.form: inputs.ours}
        skipped = {}
        for name, backend in BACKENDS.items():
            tokens, ms = last.get(name, (length, 0.0))
            if ms * (length / tokens) ** 2 > SLOWEST:
                seconds = ms * (length / tokens) ** 2 / 1000
                skipped[name] = Timed(None, f"not run: would take about {seconds:.0f} s")
            else:
                sides[name] = inputs.theirs(backend)
        timed = bench.compare(sides)
        last |= {name: (length, item.ms) for name, item in timed.items() if item.ms is not None}
        goals = {}
        if section == "forward" and shape == "B8 H32 D128" and length in GOALS:
            goals = {"SDPA flash": GOALS[length]}
        yield from lines(section, case, bench.form, {**timed, **skipped}, goals, call="eager", **details)
        if section == "forward" and length <= 2048:
            timed = bench.replay({name: (sides[name], 1) for name in (bench.form, "SDPA flash")})
            yield from lines(section, f"{case} graph", bench.form, timed, {}, call="graph", **details)
        del inputs, sides
        bench.device.empty_cache()


class Sequence:
    """One set of inputs, and both sides as calls without arguments."""

    def __init__(self, bench: Bench, batch: int, heads: int, length: int, dim: int, training: bool) -> None:
        self.qkv = [bench.rows(batch, heads, length, dim) for _ in range(3)]
        self.tables = bench.tables(heads)
        self.form, self.training = bench.form, training
        self.grad = bench.rows(batch, heads, length, dim) if training else None
        if training:
            for x in (*self.qkv, *self.tables):
                x.requires_grad_()

    def attention(self, qkv: list[Tensor], tables: tuple[Tensor, ...], form: str) -> Tensor:
        alpha, conv = tables
        return ops.augmented_attention(*qkv, alpha=alpha, conv_weight=conv, group_size=GROUP, form=form)

    def ours(self) -> Any:
        leaves = [*self.qkv, *self.tables]
        return self.run(lambda: self.attention(self.qkv, self.tables, self.form), leaves)

    def theirs(self, backend: SDPBackend) -> Call:
        return lambda: self.run(lambda: softmax(backend, *self.qkv), self.qkv)

    def run(self, call: Callable[[], Tensor], leaves: list[Tensor]) -> Any:
        if not self.training:
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call(), leaves, self.grad)

    def wrong(self) -> str:
        """Whether the first and the last head differ from the torch form at this size; "" if not."""
        got = self.ours()
        found = list(got[:3]) if self.training else [got]
        picked = [ends(x.detach()) for x in self.qkv]
        tables = tuple(x.detach()[[0, -1]] for x in self.tables)
        if self.grad is not None:
            picked = [x.requires_grad_() for x in picked]
            out = self.attention(picked, tables, "torch")
            want = list(torch.autograd.grad(out, picked, ends(self.grad)))
        else:
            want = [self.attention(picked, tables, "torch")]
        names = ("dquery", "dkey", "dvalue") if self.training else ("out",)
        for name, a, b in zip(names, found, want, strict=True):
            error = float((ends(a).float() - b.float()).norm() / b.float().norm())
            if not error < CLOSE:
                return f"not timed, {name} is off by {error:.2g} at this size"
        return ""


def ends(x: Tensor) -> Tensor:
    """The first head of the first sequence and the last of the last: [1, 2, T, D]."""
    return torch.stack([x[0, 0], x[-1, -1]])[None]


def forward(bench: Bench) -> Iterator[Row]:
    for dim in (128, 64):
        yield from sequences(bench, "forward", 8, 32, dim, [256 << n for n in range(10)], training=False)


def training(bench: Bench) -> Iterator[Row]:
    for dim in (128, 64):
        yield from sequences(bench, "training", 8, 32, dim, [512 << n for n in range(9)], training=True)


def long(bench: Bench) -> Iterator[Row]:
    """Few heads: the length is split among programs."""
    for dim, train in itertools.product((128, 64), (False, True)):
        yield from sequences(bench, "long", 1, 8, dim, [2048 << (2 * n) for n in range(5)], training=train)


# ------------------------------------------------------------------------------------- one token, trees


class Decoding:
    """States enough to fill more than the L2 cache, used in turn; their lengths differ, so that folds do."""

    def __init__(self, bench: Bench, heads: int, kv_heads: int, dim: int) -> None:
        self.bench, self.batch, self.dim = bench, 1 if bench.dry else 8, dim
        self.heads, self.kv_heads = heads, kv_heads
        self.alpha, self.conv = bench.tables(heads)
        first = self._state(0)
        self.count = 2 if bench.dry else max(16, math.ceil(_L2 / first.nbytes))
        self.states = [first, *(self._state(number) for number in range(1, self.count))]

    def _state(self, number: int) -> ops.AttentionState:
        options: dict[str, Any] = dict(dtype=torch.bfloat16, device=self.bench.device.name)
        state = ops.AttentionState.new(
            self.batch, self.kv_heads, self.dim, group_size=GROUP, taps=TAPS, **options
        )
        length = 2 * GROUP + 4 * (number % (GROUP // 4))
        key, value = self._rows(self.kv_heads, length), self._rows(self.kv_heads, length)
        ops.augmented_commit(key, value, state)
        return state

    def _rows(self, heads: int, length: int) -> Tensor:
        return self.bench.rows(self.batch, heads, length, self.dim)

    def tokens(self, count: int) -> list[Tensor]:
        return [self._rows(heads, count) for heads in (self.heads, self.kv_heads, self.kv_heads)]

    def step(self) -> Call:
        token, turn = self.tokens(1), itertools.cycle(self.states)

        def call() -> Tensor:
            with torch.no_grad():
                options: dict[str, Any] = dict(conv_weight=self.conv, form=self.bench.form)
                return ops.augmented_extend(*token, next(turn), alpha=self.alpha, **options)

        return call

    def tree(self, nodes: int) -> Call:
        """The registered operator: `ops.augmented_tree` makes masks of the parents first, on the CPU."""
        draft, turn = self.tokens(nodes), itertools.cycle(self.states)
        parents = torch.tensor([-1, *((node - 1) // 2 for node in range(1, nodes))])
        masks = ops.lineage(parents, self.batch, nodes, torch.device(self.bench.device.name))
        tables = (self.alpha, torch.ones_like(self.alpha), self.conv)

        def call() -> Tensor:
            state, options = next(turn).tensors, ("relu2", GROUP, True, self.bench.form)
            return torch.ops.linearize.augmented_tree(*draft, *state, *masks, *tables, *options)

        return call

    def cached(self, backend: SDPBackend, context: int) -> tuple[Call, int]:
        """One query on a full KV cache, and how many caches take turns."""
        size = 4 * self.batch * self.kv_heads * context * self.dim
        count = 2 if self.bench.dry else max(1, math.ceil(_L2 / size))
        query = self._rows(self.heads, 1)
        caches = [[self._rows(self.kv_heads, context) for _ in range(2)] for _ in range(count)]
        turn = itertools.cycle(caches)

        def call() -> Tensor:
            with torch.no_grad():
                return softmax(backend, query, *next(turn), causal=False)

        return call, count


def decode(bench: Bench) -> Iterator[Row]:
    contexts = (64, 128) if bench.dry else (256, 1024, 4096, 16384, 65536)
    ours = f"{bench.form} step"
    for dim, kv_heads in ((128, 32), (64, 32), (128, 8)):
        shape = f"B8 H32/{kv_heads} D{dim}"
        refusal = bench.refusal(("step",), dim)
        if refusal:
            yield Row("decode", shape, ours, "SDPA flash", note=refusal)
            continue
        made = Decoding(bench, 32, kv_heads, dim)
        for context in contexts:
            case, details = f"{shape} cache of {context}", dict(shape=shape, context=context)
            sides = {ours: (made.step(), made.count)}
            sides |= {name: made.cached(backend, context) for name, backend in BACKENDS.items()}
            timed = bench.compare({name: call for name, (call, _) in sides.items()}, 0.3, wall=True)
            yield from lines("decode", case, ours, timed, {}, call="eager", **details)
            timed = bench.replay({name: sides[name] for name in (ours, "SDPA flash")}, 0.3)
            yield from lines("decode", f"{case} graph", ours, timed, {}, call="graph", **details)
            del sides
            bench.device.empty_cache()


def tree(bench: Bench) -> Iterator[Row]:
    for dim in (128, 64):
        shape = f"B8 H32 D{dim}"
        refusal = bench.refusal(("step", "tree"), dim)
        if refusal:
            yield Row("tree", shape, "tree of 64", "one step", note=refusal)
            continue
        made = Decoding(bench, 32, 32, dim)
        sides = {"tree of 64": made.tree(64), "one step": made.step()}
        timed = bench.compare(sides, 0.3, wall=True)
        yield from lines("tree", shape, "tree of 64", timed, {}, call="eager", shape=shape)
        timed = bench.replay({name: (call, made.count) for name, call in sides.items()}, 0.3)
        yield from lines("tree", f"{shape} graph", "tree of 64", timed, {}, call="graph", shape=shape)


# ------------------------------------------------------------------------------------- others, and inside


def fla(bench: Bench) -> Iterator[Row]:
    """flash-linear-attention: linear part, causal convolution and attention inside groups, added up.

    Its local part is SDPA's flash on groups of 64 tokens: it has no relu^2. The linear part is a row too.
    """
    whole, part = "fla composition", "fla linear part"
    try:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.l2norm import l2norm
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        yield Row("fla", "B8 H32 D128", bench.form, whole, note=f"not installed: {error}")
        return

    def linear(x: Sequence) -> Tensor:
        q, k, v = (item.transpose(1, 2) for item in x.qkv)
        return chunk_linear_attn(l2norm(q), l2norm(k), v, scale=1.0, normalize=False)[0]

    def composed(x: Sequence, taps: Tensor) -> Tensor:
        v = x.qkv[2].transpose(1, 2)  # [B, T, H, D]
        conv = causal_conv1d(v.flatten(2), taps)[0].view(v.shape)
        groups = [item.transpose(1, 2).unflatten(1, (-1, GROUP)).flatten(0, 1) for item in x.qkv]
        local = softmax(SDPBackend.FLASH_ATTENTION, *(item.transpose(1, 2) for item in groups))
        out = linear(x) * x.tables[0][:, None].to(v.dtype) + conv
        return (out + local.transpose(1, 2).reshape(v.shape)).transpose(1, 2)

    batch, heads, dim = (1, 2, 128) if bench.dry else (8, 32, 128)
    for train, length in itertools.product((False, True), (64, 128) if bench.dry else (2048, 8192, 32768)):
        case = f"B8 H32 D128 T={length}" + (" fwd+bwd" if train else "")
        refusal = bench.refusal(("forward", "backward") if train else ("forward",), dim)
        if refusal:
            yield Row("fla", case, bench.form, whole, note=refusal)
            continue
        x = Sequence(bench, batch, heads, length, dim, train)
        taps = x.tables[1].detach().flip(1).repeat_interleave(dim, 0).to(torch.bfloat16)
        leaves = [*x.qkv, x.tables[0], taps.requires_grad_(train)]
        sides = {
            bench.form: x.ours,
            whole: partial(x.run, partial(composed, x, taps), leaves),
            part: partial(x.run, lambda x=x: linear(x).transpose(1, 2), x.qkv),
        }
        timed = bench.compare(sides)
        goals = {whole: 2.0 if train else 2.5}
        yield from lines("fla", case, bench.form, timed, goals, length=length, training=train)
        del x, sides
        bench.device.empty_cache()


def profile(bench: Bench) -> Iterator[Row]:
    """Where the time goes: every kernel of one forward and backward at 8192 tokens."""
    batch, heads, length, repeats = (1, 2, 128, 1) if bench.dry else (8, 32, 8192, 5)
    for dim in (128, 64):
        case = f"B8 H32 D{dim} T={length} fwd+bwd"
        refusal = bench.refusal(("forward", "backward"), dim)
        if refusal:
            yield Row("profile", case, bench.form, "", note=refusal)
            continue
        x = Sequence(bench, batch, heads, length, dim, training=True)
        for _ in range(3):
            bench.device.sample(x.ours)
        kind = ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA
        with profiler(activities=[kind]) as found:
            for _ in range(repeats):
                bench.device.sample(x.ours)
        spent = [
            (item.self_cpu_time_total if bench.dry else item.self_device_time_total, item)
            for item in found.key_averages()
        ]
        for microseconds, item in sorted(spent, key=lambda pair: -pair[0])[:20]:
            if microseconds > 0 and "zero" not in item.key and "fill" not in item.key.lower():
                ms, count = microseconds / repeats / 1000, item.count / repeats
                yield Row("profile", case, item.key[:60], "", ms, note=f"{count:g} launches")


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "forward": forward,
    "training": training,
    "fla": fla,
    "decode": decode,
    "tree": tree,
    "long": long,
    "profile": profile,
}
