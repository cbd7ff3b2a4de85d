"""Time of capture, match and rewrite against the number of layers.

    python benchmarks/passes.py [--layers 2 4 8 16 32 64] [--json FILE]

A llama decoder with tiny layers: the time of the passes depends on the number of nodes, not on their sizes.
`capture` is torch.export with dynamic batch and length, `match` finds and proves every site, masks evaluated,
`raise` replaces each by the exact call, `lower` by its attention module. Both find the sites again, so
`rewrite` is what the dearer of the two takes beyond `match`. Times are processor seconds of one thread, which
a busy machine changes little.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from linearize.passes import find_attention, lower_attention, raise_attention
from linearize.passes.capture import capture
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig
from linearize.planning.plan import site_spec


@dataclass(frozen=True)
class Timing:
    """Seconds by stage, best of the repeats; `nodes` and `sites` of the captured graph."""

    layers: int
    nodes: int
    sites: int
    capture: float
    match: float
    raised: float
    lowered: float

    @property
    def rewrite(self) -> float:
        """Seconds of the dearer rewrite beyond finding the sites."""
        return max(self.raised, self.lowered) - self.match

    @property
    def share(self) -> float:
        """Match and rewrite as a part of capture."""
        return max(self.raised, self.lowered) / self.capture


def decoder(layers: int) -> LlamaForCausalLM:
    """A llama with grouped heads, `layers` layers and next to no parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def best(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result of `work` and the seconds of its fastest run."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        gc.disable()  # as timeit does: a collection costs what the whole process holds
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
        gc.enable()
    return result, min(seconds)


def measure(layers: int, repeats: int) -> Timing:
    """Time every stage on a decoder of `layers` layers."""
    model = decoder(layers)
    ids = torch.arange(2 * 11).reshape(2, 11)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    config = LinearizeConfig()
    with torch.no_grad():
        graph, captured = best(lambda: capture(model, (), inputs), repeats)
        report, matched = best(lambda: find_attention(graph), repeats)
        _, raised = best(lambda: raise_attention(graph), repeats)
        _, lowered = best(
            lambda: lower_attention(graph, lambda site: build_attention(site_spec(site), config)),
            repeats,
        )
    if len(report.sites) != layers:
        sys.exit(f"{layers} layers, but {len(report.sites)} sites found")
    return Timing(layers, len(graph.graph.nodes), len(report.sites), captured, matched, raised, lowered)


def table(timings: list[Timing]) -> Table:
    out = Table(title=f"torch {torch.__version__}, one thread, seconds; share = (match + rewrite) / capture")
    for name in ("layers", "nodes", "sites", "capture", "match", "rewrite", "share", "ms per layer"):
        out.add_column(name, justify="right")
    for t in timings:
        figures = f"{t.capture:.2f}", f"{t.match:.3f}", f"{t.rewrite:.3f}", f"{t.share:.1%}"
        per_layer = f"{1e3 * (t.match + t.rewrite) / t.layers:.1f}"
        out.add_row(str(t.layers), str(t.nodes), str(t.sites), *figures, per_layer)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(1, 1)  # imports and caches
    timings = [measure(layers, options.repeats) for layers in options.layers]
    Console().print(table(timings))
    if options.json is not None:
        rows = [{**dataclasses.asdict(t), "rewrite": t.rewrite, "share": t.share} for t in timings]
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
