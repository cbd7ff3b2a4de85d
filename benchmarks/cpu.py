"""The CPU forms beside PyTorch's softmax attention and flash-linear-attention's naive forms.

    python benchmarks/cpu.py [--quick] [--section NAME ...] [--threads 1] [--json FILE] [--plot FILE.png]

Both sides are measured in one run, turn by turn, medians. Ratios are of processor time with one thread, which
a busy machine changes little, and of wall time with several; the JSON has both. `softmax` is
`F.scaled_dot_product_attention(is_causal=True)`. H = 8, batch 1, groups of 64 tokens, 32 taps.

Needs what the extra `[bench]` brings: psutil, matplotlib for the plot, fla-core for the naive forms.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from measured import Row, row_of, sources_hash, summary, table, write_json
from torch import Tensor

from linearize.errors import InputError
from linearize.ops import attention as ops

HEADS, GROUP, TAPS = 8, 64, 32
FORMS = ("torch", "cpu")
FORWARD_GOALS = {
    "torch": {512: 1.3, 2048: 4.0, 8192: 13.0, 32768: 35.0},
    "cpu": {512: 3.5, 2048: 9.0, 8192: 30.0, 32768: 80.0},
}
TRAINING_GOALS = {"torch": {512: 1.3, 2048: 4.0, 8192: 10.0}, "cpu": {512: 1.3, 2048: 4.0, 8192: 10.0}}
DECODE_GOALS = {"torch": {}, "cpu": {256: 1.0, 4096: 80.0}}
"""All at D = 64."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured. plotted: further lengths at D = 64 in float32; alone: those of ours only."""

    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    plotted: tuple[int, ...] = (1024, 4096, 16384)
    alone: tuple[int, ...] = (131072,)
    training: tuple[int, ...] = (512, 2048, 8192)
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    memory: tuple[int, ...] = (4096, 16384, 65536, 262144)
    mechanisms: tuple[int, ...] = (2048, 8192)
    naive: tuple[int, ...] = (512, 2048, 8192)
    dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    seconds: float = 1.0
    """For repeating one case, beyond one call of each side."""


QUICK = Sizes(
    lengths=(512, 2048),
    plotted=(),
    alone=(),
    training=(512, 2048),
    contexts=(256, 4096),
    memory=(16384,),
    mechanisms=(2048,),
    naive=(512, 2048),
    dims=(64,),
    dtypes=("float32",),
    seconds=0.3,
)


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of one call: processor time of all threads, and wall time."""

    cpu: float
    wall: float
    runs: int

    @property
    def ms(self) -> float:
        return self.cpu if torch.get_num_threads() == 1 else self.wall


# ------------------------------------------------------------------------------------------- measuring


def compare(
    sides: dict[str, Call], seconds: float, least: int = 1, *, slow: float = 1.0, rounds: int = 3
) -> dict[str, Timed]:
    """Each side's median, `rounds` turns or more. What takes longer than `slow` seconds is called once only.

    Calls of less than 5 ms are timed many at once, `least` or more: reading a clock must not count, and what
    happens only now and then must.
    """
    first = {}
    for name, call in sides.items():
        first[name] = _sample(call, 1)
        if first[name][1] < 3:  # it may have loaded or compiled something
            first[name] = _sample(call, 1)
    samples = {name: [pair] for name, pair in first.items()}
    repeated = {name: wall for name, (_, wall) in first.items() if wall < slow}
    times = {
        name: 1 if wall > 0.005 else min(256, max(least, math.ceil(0.005 / wall)))
        for name, wall in repeated.items()
    }
    round_trip = sum(count * first[name][1] for name, count in times.items())
    for _ in range(max(rounds, min(15, int(seconds / (round_trip + 1e-6))))):
        for name, count in times.items():
            samples[name].append(_sample(sides[name], count))
    out = {}
    for name, taken in samples.items():
        kept = taken[1:] or taken
        cpu, wall = (1000 * statistics.median(column) for column in zip(*kept, strict=True))
        out[name] = Timed(cpu, wall, len(kept))
    return out


def _sample(call: Call, times: int) -> tuple[float, float]:
    """Seconds of one call: processor, wall."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def lines(
    section: str,
    case: str,
    timed: dict[str, Timed],
    theirs: str,
    goals: dict[str, float],
    notes: dict[str, str],
    **details: Any,
) -> Iterator[Row]:
    """One row for each of our sides, against `theirs`; `notes` for those that did not run."""
    other = timed.get(theirs)
    for name, reason in notes.items():
        yield Row(section, case, name, theirs, None, other and other.ms, goals.get(name), reason, details)
    for name, mine in timed.items():
        if name != theirs:
            walls = dict(ours_wall_ms=mine.wall, ours_cpu_ms=mine.cpu, ours_runs=mine.runs)
            if other is not None:
                walls |= dict(theirs_wall_ms=other.wall, theirs_cpu_ms=other.cpu, theirs_runs=other.runs)
            times = (mine.ms, None if other is None else other.ms)
            yield Row(section, case, name, theirs, *times, goals.get(name), "", {**details, **walls})


# ------------------------------------------------------------------------------------------- inputs


def rows(heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, heads, length, dim, dtype=dtype).normal_()


def parameters() -> dict[str, Any]:
    return dict(alpha=torch.rand(HEADS) + 0.5, conv_weight=torch.randn(HEADS, TAPS) * 0.2, group_size=GROUP)


def missing(form: str, query: Tensor) -> str:
    """Why `form` cannot run here; "" when it can."""
    try:
        ops.which(query, query, query, form=form, **parameters())
    except InputError as error:
        return str(error)
    return ""


def usable(query: Tensor) -> tuple[list[str], dict[str, str]]:
    """The forms that run, and why the others do not."""
    notes = {f"{form} form": missing(form, query) for form in FORMS}
    return [form for form in FORMS if not notes[f"{form} form"]], {k: v for k, v in notes.items() if v}


def named(goals: dict[str, dict[int, float]], at: int, dim: int) -> dict[str, float]:
    """Goals by the name of our side."""
    return {f"{form} form": goals[form][at] for form in FORMS if dim == 64 and at in goals[form]}


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


# ------------------------------------------------------------------------------------------- sections


def forward(sizes: Sizes) -> Iterator[Row]:
    for dim, dtype in itertools.product(sizes.dims, sizes.dtypes):
        plotted = dim == 64 and dtype == "float32"
        lengths = sizes.lengths + (sizes.plotted + sizes.alone if plotted else ())
        for length in sorted(lengths):
            yield from _sequence(sizes, "forward", length, dim, dtype, alone=length in sizes.alone)


def training(sizes: Sizes) -> Iterator[Row]:
    for dim, dtype, length in itertools.product(sizes.dims, sizes.dtypes, sizes.training):
        yield from _sequence(sizes, "training", length, dim, dtype, alone=False)


def _sequence(sizes: Sizes, section: str, length: int, dim: int, dtype: str, alone: bool) -> Iterator[Row]:
    train = section == "training"
    qkv = [rows(HEADS, length, dim, getattr(torch, dtype)).requires_grad_(train) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    options = parameters()
    tables = [options["alpha"].requires_grad_(train), options["conv_weight"].requires_grad_(train)]

    def run(call: Callable[..., Tensor], leaves: list[Tensor]) -> Any:
        with torch.set_grad_enabled(train):
            out = call(*qkv)
        return torch.autograd.grad(out, leaves, grad) if train else out

    def ours(form: str) -> Call:
        return lambda: run(lambda *x: ops.augmented_attention(*x, form=form, **options), [*qkv, *tables])

    forms, notes = usable(qkv[0])
    sides: dict[str, Call] = {} if alone else {"softmax": lambda: run(softmax, qkv)}
    sides |= {f"{form} form": ours(form) for form in forms}
    case = f"T={length} D={dim} {dtype}" + (" fwd+bwd" if train else "")
    goals = named(TRAINING_GOALS if train else FORWARD_GOALS, length, dim)
    details = dict(length=length, dim=dim, dtype=dtype)
    yield from lines(section, case, compare(sides, sizes.seconds), "softmax", goals, notes, **details)


def decode(sizes: Sizes) -> Iterator[Row]:
    """One token after the state, against one query on a full cache of keys and values (nothing appended).

    Each side goes from layer to layer, as a model does, and not over one warm cache: 32 layers, or as many as
    fit `_LAYERS_BYTES`.
    """
    for dim, context in itertools.product(sizes.dims, sizes.contexts):
        token = [rows(HEADS, 1, dim, torch.float32) for _ in range(3)]
        options = {key: x for key, x in parameters().items() if key != "group_size"}

        def ours(form: str, dim: int = dim, token: list[Tensor] = token, options: Any = options) -> Call:
            states = []
            for layer in range(_LAYERS):
                states.append(ops.AttentionState.new(1, HEADS, dim, group_size=GROUP, taps=TAPS))
                before = [rows(HEADS, 3 * GROUP + 2 * layer, dim, torch.float32) for _ in range(2)]
                ops.augmented_commit(*before, states[-1])
            layers = itertools.cycle(states)
            return lambda: ops.augmented_extend(*token, next(layers), form=form, **options)

        size = 2 * HEADS * context * dim * 4
        caches = [
            [rows(HEADS, context, dim, torch.float32) for _ in range(2)]
            for _ in range(max(1, min(_LAYERS, _LAYERS_BYTES // size)))
        ]
        forms, notes = usable(token[0])
        sides = {f"{form} form": ours(form) for form in forms}
        layers = itertools.cycle(caches)
        sides["softmax"] = lambda q=token[0], layers=layers: F.scaled_dot_product_attention(q, *next(layers))
        goals = named(DECODE_GOALS, context, dim)
        with torch.no_grad():
            timed = compare(sides, sizes.seconds, least=2 * GROUP)  # each layer folds a group every 64th step
        case, details = f"cache of {context} D={dim}", dict(context=context, dim=dim, layers=len(caches))
        yield from lines("decode", case, timed, "softmax", goals, notes, **details)


_LAYERS, _LAYERS_BYTES = 32, 1 << 30


def mechanism(sizes: Sizes) -> Iterator[Row]:
    """Every mechanism as a module, forward; bidirectional where it cannot be causal."""
    # Here, because the processes that measure memory start faster without it.
    from linearize import mechanisms
    from linearize.mechanisms.spec import SiteSpec
    from linearize.planning.build import build_attention
    from linearize.planning.config import LinearizeConfig

    for length in sizes.mechanisms:
        qkv = [rows(HEADS, length, 64, torch.float32) for _ in range(3)]
        sides: dict[bool, dict[str, Call]] = {
            causal: {"softmax": lambda x=qkv, c=causal: F.scaled_dot_product_attention(*x, is_causal=c)}
            for causal in (True, False)
        }
        for name, found in mechanisms.available().items():
            causal = "causal" in found.supports
            if name != "softmax":
                options = {"max_length": length} if "max_length" in found.options else {}
                config = LinearizeConfig(mechanism=name, options=options)
                module = build_attention(SiteSpec(HEADS, HEADS, 64, 64, causal=causal), config).eval()
                sides[causal][name] = lambda module=module, x=qkv: module(*x)
        for causal, group in sides.items():
            if len(group) > 1:
                with torch.no_grad():
                    timed = compare(group, sizes.seconds)
                case = f"T={length} D=64 float32" + ("" if causal else " bidirectional")
                yield from lines("mechanisms", case, timed, "softmax", {}, {}, length=length, causal=causal)


def augmented(sizes: Sizes) -> Iterator[Row]:
    """`augmented` at its default sizes: whole sequences, with gradients, and tokens after a state."""
    from linearize.mechanisms.spec import SiteSpec
    from linearize.planning.build import build_attention
    from linearize.planning.config import LinearizeConfig

    module = build_attention(SiteSpec(HEADS, HEADS, 64, 64, causal=True), LinearizeConfig()).eval()
    for train, length in itertools.product((False, True), sizes.training):
        qkv = [rows(HEADS, length, 64, torch.float32).requires_grad_(train) for _ in range(3)]
        grad = torch.randn_like(qkv[0])

        def run(call: Callable[..., Tensor], train: bool = train, qkv: Any = qkv, grad: Any = grad) -> Any:
            with torch.set_grad_enabled(train):
                out = call(*qkv)
            return torch.autograd.grad(out, qkv, grad) if train else out

        sides: dict[str, Call] = {
            "softmax": lambda run=run: run(softmax),
            "augmented": lambda run=run: run(module),
        }
        case = f"T={length} D=64 float32" + (" fwd+bwd" if train else "")
        timed = compare(sides, sizes.seconds)
        yield from lines("augmented", case, timed, "softmax", {}, {}, length=length)
    for context in sizes.contexts:
        token = [rows(HEADS, 1, 64, torch.float32) for _ in range(3)]
        cache = [rows(HEADS, context, 64, torch.float32) for _ in range(2)]
        state = module.new_state(1, dtype=torch.float32, device=torch.device("cpu"))
        sides = {
            "softmax": lambda x=token, c=cache: F.scaled_dot_product_attention(x[0], *c),
            "augmented": lambda x=token, s=state: module.extend(*x, s),
        }
        with torch.no_grad():
            module.extend(*(rows(HEADS, 600, 64, torch.float32) for _ in range(3)), state)
            timed = compare(sides, sizes.seconds, least=64)
        case = f"one token after {context} D=64"
        yield from lines("augmented", case, timed, "softmax", {}, {}, context=context)

    yield from one_token(sizes)


def one_token(sizes: Sizes) -> Iterator[Row]:
    """A step of `augmented` in SmolLM2's shape: laid out once, and with all looked at anew."""
    from linearize.mechanisms.salient_calls import SalientCalls
    from linearize.mechanisms.spec import SiteSpec
    from linearize.planning.build import build_attention
    from linearize.planning.config import LinearizeConfig

    heads = 9, 3, 3
    module: Any = build_attention(SiteSpec(9, 3, 64, 64, causal=True), LinearizeConfig()).eval()
    before, token = ([rows(n, length, 64, torch.float32) for n in heads] for length in (600, 1))
    states = [module.new_state(1, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2)]
    with torch.no_grad():
        for state in states:
            module.extend(*before, state)
        sides: dict[str, Call] = {
            "all looked at anew": lambda: super(SalientCalls, module).extend(*token, states[0]),
            "augmented": lambda: module.extend(*token, states[1]),
        }
        timed = compare(sides, sizes.seconds, least=256)
    case = "one token, 9 heads and 3 of keys D=64"
    yield from lines("augmented", case, timed, "all looked at anew", {}, {})


def pieces(sizes: Sizes) -> Iterator[Row]:
    """4096 tokens through a state of the core operator, whole and in pieces."""
    length, dim = 4096, 64
    qkv = [rows(HEADS, length, dim, torch.float32) for _ in range(3)]
    options = {key: x for key, x in parameters().items() if key != "group_size"}

    def run(size: int) -> None:
        state = ops.AttentionState.new(1, HEADS, dim, group_size=GROUP, taps=TAPS)
        for start in range(0, length, size):
            ops.augmented_extend(*(x[:, :, start : start + size] for x in qkv), state, **options)

    sides: dict[str, Call] = {f"pieces of {n}": lambda n=n: run(n) for n in (1024, 256, 64, 16)}
    with torch.no_grad():
        timed = compare({"whole": lambda: run(length), **sides}, sizes.seconds)
    yield from lines("pieces", f"{length} tokens D=64 float32", timed, "whole", {}, {})


def encoder(sizes: Sizes) -> Iterator[Row]:
    """Attention both ways in MiniLM's shape, 12 heads of 32, as modules beside PyTorch's."""
    from linearize.mechanisms.spec import SiteSpec
    from linearize.planning.build import build_attention
    from linearize.planning.config import LinearizeConfig

    heads, dim = 12, 32
    for length in (128, *sizes.training):
        if length > 2048:
            continue
        # As models have them: the heads of a token side by side.
        qkv = [rows(length, heads, dim, torch.float32).transpose(1, 2) for _ in range(3)]
        sides: dict[str, Call] = {"softmax": lambda x=qkv: F.scaled_dot_product_attention(*x)}
        for name in ("augmented", "augmented_paper"):
            spec = SiteSpec(heads, heads, dim, dim, causal=False)
            module = build_attention(spec, LinearizeConfig(mechanism=name)).eval()
            sides[name] = lambda module=module, x=qkv: module(*x)
        with torch.no_grad():
            timed = compare(sides, sizes.seconds)
        yield from lines("encoder", f"T={length} D=32 float32", timed, "softmax", {}, {}, length=length)


def naive(sizes: Sizes) -> Iterator[Row]:
    """flash-linear-attention's forms that run on a CPU: plain linear attention, less than ours computes."""
    try:
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn, naive_recurrent_linear_attn
    except ImportError as error:
        yield Row("fla", "", "torch form", "fla naive chunk", note=f"fla-core is not installed: {error}")
        return
    for length in sizes.naive:
        qkv = [rows(HEADS, length, 64, torch.float32) for _ in range(3)]
        other = [x.transpose(1, 2).contiguous() for x in qkv]  # [B, T, H, D]
        options = parameters()
        forms, notes = usable(qkv[0])
        ours: dict[str, Call] = {
            f"{form} form": lambda form=form, x=qkv, o=options: ops.augmented_attention(*x, form=form, **o)
            for form in forms
        }
        theirs = {"fla naive chunk": naive_chunk_linear_attn}
        if length == min(sizes.naive):
            theirs["fla naive recurrent"] = naive_recurrent_linear_attn
        for name, call in theirs.items():
            with torch.no_grad():
                timed = compare({**ours, name: lambda call=call, x=other: call(*x, scale=1.0)}, sizes.seconds)
            yield from lines("fla", f"T={length} D=64 float32", timed, name, {}, notes, length=length)


def memory(sizes: Sizes) -> Iterator[Row]:
    """Peak memory beyond the inputs, outputs and gradients included, by length; and bytes per token."""
    for form, train in itertools.product(FORMS, (False, True)):
        reason = missing(form, rows(HEADS, 1, 64, torch.float32))
        what = "fwd+bwd" if train else "forward"
        if reason:
            yield Row("memory", f"{what} D=64 float32", f"{form} form", "", note=reason)
            continue
        points = []
        for length in sizes.memory:
            command = [sys.executable, __file__, "--child", json.dumps([form, length, train])]
            command += ["--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                note = f"failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:100]}"
                yield Row("memory", f"T={length} D=64 float32 {what}", f"{form} form", "", note=note)
                continue
            found = json.loads(done.stdout)
            points.append((length, found["peak"]))
            details = dict(length=length, form=form, training=train, **found)
            note = f"{found['peak'] / 1e6:.0f} MB, {found['peak'] / length:.0f} bytes per token"
            case = f"T={length} D=64 float32 {what}"
            yield Row("memory", case, f"{form} form", "", found["cpu_ms"], note=note, details=details)
        if len(points) > 1:
            yield fit(points, form, train)


def fit(points: list[tuple[int, int]], form: str, train: bool) -> Row:
    """The line through (tokens, bytes). What has to exist in any case: the output, and three gradients."""
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    least = (4 if train else 1) * HEADS * 64 * 4
    note = f"{slope:.0f} bytes per token and {start / 1e6:.0f} MB; results alone are {least} per token"
    details = dict(bytes_per_token=slope, constant_bytes=start, results_bytes_per_token=least)
    case = f"fit {'fwd+bwd' if train else 'forward'} D=64 float32"
    return Row("memory", case, f"{form} form", "", note=note, details=details)


def child(form: str, length: int, train: bool) -> None:
    """One call in a process of its own, whose peak memory is then this call's; prints JSON."""
    options = parameters()

    def run(length: int) -> tuple[int, float]:
        qkv = [rows(HEADS, length, 64, torch.float32).requires_grad_(train) for _ in range(3)]
        grad = rows(HEADS, length, 64, torch.float32) if train else None
        # Fill what the process gave back since its peak, so that the peak moves with the first new byte.
        ballast = bytearray(max(0, peak() - psutil.Process().memory_info().rss))
        before, cpu = peak(), time.process_time()
        with torch.set_grad_enabled(train):
            out = ops.augmented_attention(*qkv, form=form, **options)
        if train:
            torch.autograd.grad(out, qkv, grad)
        spent = 1000 * (time.process_time() - cpu)
        del ballast
        return peak() - before, spent

    run(2 * GROUP)  # code and work space that any length needs
    gc.collect()
    more, cpu = run(length)
    print(json.dumps(dict(peak=more, cpu_ms=cpu, process_peak=peak())))


def peak() -> int:
    """Bytes of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


SECTIONS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "forward": forward,
    "training": training,
    "decode": decode,
    "memory": memory,
    "mechanisms": mechanism,
    "augmented": augmented,
    "encoder": encoder,
    "pieces": pieces,
    "fla": naive,
}


# ------------------------------------------------------------------------------------------- output


def plot(measured: Sequence[Row], clock: str, path: Path) -> None:
    """Cost against length at D = 64 in float32, both axes logarithmic. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths: dict[str, dict[int, float]] = {}
    for row in measured:
        if row.section == "forward" and (row.details["dim"], row.details["dtype"]) == (64, "float32"):
            for name, ms in ((row.ours, row.ours_ms), (row.theirs, row.theirs_ms)):
                if ms is not None:
                    lengths.setdefault(name, {})[row.details["length"]] = ms
    labels = {
        "softmax": "softmax (PyTorch SDPA)",
        "torch form": "augmented, PyTorch",
        "cpu form": "augmented, C++",
    }
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in sorted(lengths, key=list(labels).index):
        points = sorted(lengths[name].items())
        axes.plot(*zip(*points, strict=True), marker="o", label=labels[name])
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"milliseconds of {clock}")
    axes.set_title(f"Causal attention, forward, {HEADS} heads of 64, float32, one layer", fontsize=10)
    ticks = sorted({length for points in lengths.values() for length in points})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def environment() -> dict[str, Any]:
    return dict(
        processor=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        clock="processor time" if torch.get_num_threads() == 1 else "wall time",
        torch=torch.__version__,
        python=platform.python_version(),
        sources=sources_hash(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, less than a minute")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw cost against length")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: show and plot this JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.child is not None:
        child(*json.loads(options.child))
        return
    if options.source is not None:
        found = json.loads(options.source.read_text())
        setting, measured = found["environment"], [row_of(record) for record in found["rows"]]
    else:
        setting, measured = environment(), []
    failed: list[str] = []
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    for name in [] if options.source else options.section:
        torch.manual_seed(0)
        part = []
        try:
            part += SECTIONS[name](sizes or (QUICK if options.quick else Sizes()))
        except Exception:  # minutes of other sections are still to come, or were measured already
            traceback.print_exc()
            failed.append(name)
        measured += part
        print(table(part), flush=True)
        if options.json is not None:
            write_json(options.json, dict(environment=setting, rows=[row.record() for row in measured]))
    if options.source is not None:
        print(table(measured))
    print(f"\n{summary(measured)}")
    if options.plot is not None:
        plot(measured, setting["clock"], options.plot)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
