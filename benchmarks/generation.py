"""Generation by whole models on a CPU: memory, decoding against a KV cache, draft trees, speculation.

    python benchmarks/generation.py [--quick] [--section NAME ...] [--model NAME ...] [--json FILE]

Both sides of a row are measured in one run, turn by turn, medians; clocks as in `cpu.py`. `softmax` is the
model as it was, through the same transformers code, on the better of two caches filled with random keys and
values: one that grows, and one of fixed size that is written in place.

    memory       bytes of the state and of the KV cache; a million tokens beside a float64 recurrence
    decode       one step of the whole model at several contexts
    compiled     the same with both sides' steps compiled into one graph each (needs a C++ compiler)
    trees        one pass over N draft nodes, against a decode step: whole model, attention, linear layers
    speculation  tokens per second of `generate`, plain and with drafters, on text that no one was trained on

`demo` is the shipped decoder (hidden 256, 8 heads of 32 on 4 of keys and values, 4 layers); `wide` has random
weights and much attention for its size: hidden 1024, 16 heads of 64, 4 layers, feed-forward of 512, 1024
tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu import Timed, compare, environment
from measured import Row, summary, table, write_json
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import linearize as lz
from linearize.cache.draft_tree import accept, tree_logits
from linearize.demo import small_decoder
from linearize.demo.steps import encode
from linearize.mechanisms.module import AttentionModule
from linearize.ops.state import States
from linearize.planning.state import state_of

DECODE_GOALS = {1024: 1.0, 16384: 4.0, 65536: 15.0}
TREE_GOAL = {64: 1 / 3}
SPECULATION_GOAL = 2.0
Call = Callable[[], Any]

GROUP = 64
_PIECE = 8192
"""Tokens that are put into a state at once."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    tokens: of the long run, which is read in pieces of `piece` and compared at `checkpoints`; all of them
    multiples of a group. mechanisms: those that speculate, and the steps by which they are tuned before.
    training_tokens, epochs: of training heads. prompts, new_tokens: that are decoded, each prompt 200 tokens.
    """

    tokens: int = 1_000_000
    piece: int = 2048
    checkpoints: tuple[int, ...] = (1024, 10_240, 102_400, 1_000_000)
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    models: tuple[str, ...] = ("demo", "wide")
    nodes: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    budgets: tuple[int, ...] = (4, 8, 16, 32, 64)
    mechanisms: tuple[tuple[str, int], ...] = (("augmented_paper", 100), ("softmax_window", 0))
    training_tokens: int = 60_000
    epochs: float = 3.0
    prompts: int = 4
    new_tokens: int = 128
    seconds: float = 1.5


QUICK = Sizes(
    tokens=4096,
    piece=1024,
    checkpoints=(1024, 4096),
    contexts=(1024,),
    models=("demo",),
    nodes=(1, 16),
    budgets=(4,),
    mechanisms=(("augmented_paper", 2),),
    training_tokens=4000,
    epochs=0.3,
    prompts=1,
    new_tokens=16,
    seconds=0.2,
)


# ------------------------------------------------------------------------------------------- models


def softmax_model(name: str) -> LlamaForCausalLM:
    if name == "demo":
        return lz.load_demo()[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=4,
        intermediate_size=512,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


def converted(model: nn.Module, mechanism: str = "augmented_paper") -> Any:
    """A converted copy whose new parts take part: a fresh one leaves all but the local part out."""
    linear = lz.linearize(copy.deepcopy(model), mechanism=mechanism)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.05)
            if name.endswith("conv_weight"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return linear


def attentions(model: nn.Module) -> list[AttentionModule]:
    return [module for module in model.modules() if isinstance(module, AttentionModule)]


@torch.no_grad()
def filled(model: Any, context: int, cache: Any) -> Any:
    """The cache after `context` random keys and values in each layer, of states as well."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    if not attentions(model):
        for index in range(config.num_hidden_layers):
            cache.update(*torch.randn(2, 1, heads, context, dim).unbind(0), index)
        return cache
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)  # makes the states
    for layer in cache.layers:
        key, value = torch.randn(2, 1, heads, min(context, _PIECE), dim).unbind(0)
        for start in range(1, context, _PIECE):
            count = min(_PIECE, context - start)
            query = torch.zeros(1, config.num_attention_heads, count, dim)
            layer.module.commit(query, key[:, :, :count], value[:, :, :count], layer.states)
        layer.cumulative_length += context - 1
    return cache


def stepper(call: Callable[..., Any], cache: Any, context: int) -> Call:
    """One decode step after another; the position is told, as a static cache would have to be asked."""
    token, position = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[context]])

    def step() -> Any:
        nonlocal position
        position = position + 1
        return call(input_ids=token, position_ids=position, past_key_values=cache)

    return step


# ------------------------------------------------------------------------------------------- memory


def memory(sizes: Sizes) -> Iterator[Row]:
    for name in sizes.models:
        model = softmax_model(name)
        linear = converted(model)
        full = (filled(linear, tokens, DynamicCache()) for tokens in (1000, sizes.tokens))
        states = [sum(layer.states.nbytes for layer in cache.layers) for cache in full]
        config = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
        same = "the same" if states[0] == states[1] else "NOT the same"
        note = (
            f"{states[0]:,} bytes at 1,000 tokens, {same} at {sizes.tokens:,}; a KV cache has "
            f"{1000 * token:,} and {sizes.tokens * token:,}"
        )
        details = dict(state_bytes=states, kv_bytes=[1000 * token, sizes.tokens * token])
        yield Row("memory", f"{name} float32", "state", "KV cache", note=note, details=details)
    yield from long_run(sizes)


class Recurrence:
    """The operator in float64 as a recurrence over groups, from the keys and values of a running model."""

    def __init__(self, module: Any) -> None:
        self.alpha, self.local_scale = (
            x.detach().double()[:, None, None, None] for x in (module.alpha, module.local_scale)
        )
        self.taps = module.conv_weight.double()
        self.heads = (module.spec.num_heads, module.spec.num_key_value_heads)
        dims = (module.spec.head_dim, module.spec.value_dim)
        self.total = torch.zeros(self.heads[1], *dims, dtype=torch.float64)
        self.before_last = self.total
        self.values = torch.zeros(self.heads[1], self.taps.shape[1] - 1, dims[1], dtype=torch.float64)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The next tokens, whole groups: [1, H, T, D], [1, Hkv, T, D or Dv] -> [H, T, Dv]."""
        repeats = self.heads[0] // self.heads[1]
        before, start = self.values, self.total
        q, k, v, sums = unit(query[0].double()), *self.advance(key, value)
        starts = start[:, None] + torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1].cumsum(1)], 1)
        q = q.unflatten(1, (-1, GROUP))
        k, values, starts = (
            x.repeat_interleave(repeats, 0) for x in (k, v.unflatten(1, (-1, GROUP)), starts)
        )
        inside = (q @ k.mT).clamp_min(0).square().tril() @ values
        out = self.local_scale * inside + self.alpha * (q @ starts)
        reach = self.taps.shape[1]
        filtered = torch.cat([before, v], 1).unfold(1, reach, 1).repeat_interleave(repeats, 0)
        return out.flatten(1, 2) + torch.einsum("htvk,hk->htv", filtered, self.taps.flip(1))

    def advance(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same without outputs; returns the keys by group, the values, and k^T v of each group."""
        k, v = unit(key[0].double()).unflatten(1, (-1, GROUP)), value[0].double()
        sums = k.mT @ v.unflatten(1, (-1, GROUP))
        self.before_last = self.total + sums[:, :-1].sum(1)
        self.total = self.before_last + sums[:, -1]
        self.values = torch.cat([self.values, v], 1)[:, -self.values.shape[1] :]
        return k, v, sums


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Watched(AttentionModule):
    """Stands in for a site's module: its `extend`, with the recurrence run beside it on the same query, key
    and value.

    compares: whether the outputs of a call are compared, or only the state is. steps: once it is a list,
    calls are kept in it instead, until they make up a group.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module.spec)
        self.module, self.recurrence, self.compares = module, Recurrence(module), False
        self.outputs = (torch.zeros(0), torch.zeros(0))
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    @property
    def has_state(self) -> bool:
        return self.module.has_state

    def new_state(self, batch: int, **options: Any) -> States | None:
        return self.module.new_state(batch, **options)

    def extend(self, query: Tensor, key: Tensor, value: Tensor, state: Any, **options: Any) -> Tensor:
        out = self.module.extend(query, key, value, state, **options)
        if self.steps is not None:
            self.steps.append((query, key, value, out))
        elif self.compares:
            self.outputs = out[0].double(), self.recurrence(query, key, value)
        else:
            self.recurrence.advance(key, value)
        self.state = state.parts[0]
        return out

    def errors(self) -> tuple[float, float, float]:
        """Largest errors of outputs and of the state, relative to the largest entry; and the state's largest
        entry."""
        out, wanted = self.outputs
        found, sums = self.state.recurrent[0].double(), self.recurrence.before_last
        scale = sums.abs().max().clamp_min(1e-30)
        errors = (out - wanted).abs().max() / wanted.abs().max(), (found - sums).abs().max() / scale
        return float(errors[0]), float(errors[1]), float(scale)

    def step_error(self) -> float:
        """The largest error of the outputs of `steps`, relative to the largest entry."""
        query, key, value, out = (torch.cat(part, 2) for part in zip(*(self.steps or ()), strict=True))
        wanted = self.recurrence(query, key, value)
        return float((out[0].double() - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def long_run(sizes: Sizes) -> Iterator[Row]:
    """Real text, repeated as needed, through the demo decoder; then single steps of one group."""
    model, tokenizer = lz.load_demo()
    linear = converted(model)
    text = encode(tokenizer, small_decoder.training_text())
    ids = text.repeat(-(-(sizes.tokens + GROUP) // len(text)))[None]
    watched = []
    for site in state_of(linear).plan.sites:
        watch = Watched(linear.get_submodule(site.name))
        setattr(linear.get_submodule(site.path), site.child, watch)
        watched.append(watch)
    cache, at, started = DynamicCache(), 0, time.perf_counter()
    stops = sorted({*sizes.checkpoints, *range(sizes.piece, sizes.tokens, sizes.piece), sizes.tokens})
    with torch.no_grad():
        for stop in stops:
            for watch in watched:
                watch.compares = stop in sizes.checkpoints
            linear(ids[:, at:stop], past_key_values=cache, logits_to_keep=1)
            at = stop
            if stop in sizes.checkpoints:
                yield _long_row(watched, stop, time.perf_counter() - started)
        # Token by token, the recurrence by the group: at a group's end the last outputs are compared.
        for watch in watched:
            watch.steps = []
        for at in range(sizes.tokens, sizes.tokens + GROUP):
            linear(ids[:, at : at + 1], past_key_values=cache)
    error = max(watch.step_error() for watch in watched)
    yield Row(
        "memory",
        f"{sizes.tokens:,} tokens, then {GROUP} single steps",
        "demo",
        "float64 recurrence",
        note=f"largest relative error of outputs {error:.1e}",
        details=dict(tokens=sizes.tokens, output_error=error, length=int(cache.get_seq_length())),
    )


def _long_row(watched: Sequence[Watched], tokens: int, seconds: float) -> Row:
    outputs, states, scales = (list(column) for column in zip(*(w.errors() for w in watched), strict=True))
    note = (
        f"largest relative error of outputs {max(outputs):.1e}, of the state {max(states):.1e} "
        f"(its largest sum {max(scales):.0f}); {seconds:.0f} s so far, the recurrence included"
    )
    details = dict(tokens=tokens, output_error=outputs, state_error=states, state_scale=scales)
    return Row("memory", f"after {tokens:,} tokens", "demo", "float64 recurrence", note=note, details=details)


# ------------------------------------------------------------------------------------------- decoding


def caches(model: Any, context: int) -> dict[str, Any]:
    """Both kinds of KV cache, full."""
    return {
        "softmax, growing cache": filled(model, context, DynamicCache(config=model.config)),
        "softmax, static cache": filled(model, context, static_cache(model, context)),
    }


def static_cache(model: Any, context: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=context + 512)


def decode(sizes: Sizes) -> Iterator[Row]:
    for name in sizes.models:
        model = softmax_model(name)
        linear = converted(model)
        for context in sizes.contexts:
            with torch.no_grad():
                sides = {"linear": stepper(linear, filled(linear, context, DynamicCache()), context)}
                for kind, cache in caches(model, context).items():
                    sides[kind] = stepper(model, cache, context)
                timed = compare(sides, sizes.seconds)
            del sides
            yield decode_row("decode", name, context, timed)


def decode_row(section: str, name: str, context: int, timed: dict[str, Timed]) -> Row:
    """Ours against the quicker of the others."""
    ours = timed["linear"]
    theirs = min((kind for kind in timed if kind != "linear"), key=lambda kind: timed[kind].ms)
    details = dict(model=name, context=context, tokens_per_second=1000 / ours.ms)
    details |= {f"{kind}_ms": time.ms for kind, time in timed.items()}
    goal = DECODE_GOALS.get(context) if name == "wide" else None
    case = f"{name}, context {context}"
    return Row(section, case, "linear", theirs, ours.ms, timed[theirs].ms, goal, "", details)


def compiled(sizes: Sizes) -> Iterator[Row]:
    """Caches of fixed size on both sides, as a graph needs."""
    for name in sizes.models:
        model = softmax_model(name)
        linear = converted(model)
        for context in sizes.contexts:
            sides = {}
            with torch.no_grad():
                torch._dynamo.reset()
                for kind, which in (("linear", linear), ("softmax, static cache", model)):
                    cache = filled(which, context, static_cache(which, context))
                    step = stepper(torch.compile(which, fullgraph=True, dynamic=False), cache, context)
                    step()
                    sides[kind] = step
                timed = compare(sides, sizes.seconds)
            del sides
            yield decode_row("compiled", name, context, timed)


# ------------------------------------------------------------------------------------------- trees


def parents_of(nodes: int) -> Tensor:
    """A tree that branches in three and is as deep as that makes it."""
    return torch.tensor([(node - 1) // 3 if node else -1 for node in range(nodes)])


def trees(sizes: Sizes) -> Iterator[Row]:
    for name in sizes.models:
        linear = converted(softmax_model(name))
        for nodes in sizes.nodes:
            with torch.no_grad():
                pairs = {
                    "whole pass and commit": (tree_pass(linear, nodes), whole_step(linear)),
                    "attention": (attention(linear, nodes), attention(linear, None)),
                    "linear layers": (products(linear, nodes), products(linear, 1)),
                }
                for part, (ours, theirs) in pairs.items():
                    timed = compare({"tree": ours, "step": theirs}, sizes.seconds / 2)
                    goal = TREE_GOAL.get(nodes) if part != "linear layers" else None
                    times = timed["tree"].ms, timed["step"].ms
                    case, details = f"{name}, {nodes} nodes, {part}", dict(model=name, nodes=nodes, part=part)
                    note = f"{times[0] / times[1]:.2f} steps"
                    yield Row("trees", case, "tree", "decode step", *times, goal, note, details)


def whole_step(model: Any) -> Call:
    return stepper(model, filled(model, 1000, DynamicCache()), 1000)


def tree_pass(model: Any, nodes: int) -> Call:
    """Logits of all nodes, and the first of them accepted."""
    cache, parents = filled(model, 1000, DynamicCache()), parents_of(nodes)
    tokens = torch.randint(model.config.vocab_size, (1, nodes))
    path = torch.zeros(1, 1, dtype=torch.long)

    def run() -> None:
        tree_logits(model, cache, tokens, parents)
        accept(cache, path)

    return run


def attention(model: Any, nodes: int | None) -> Call:
    """The sites of all layers, nothing around them: a tree, or one step."""
    layers = attentions(model)
    states = [layer.states for layer in filled(model, 1000, DynamicCache()).layers]
    spec, count = layers[0].spec, nodes or 1
    heads = (spec.num_heads, spec.num_key_value_heads, spec.num_key_value_heads)
    tokens = [torch.randn(1, n, count, spec.head_dim) for n in heads]
    tree = lz.ops.lineage(parents_of(count), 1, count, tokens[0].device)
    pairs: list[tuple[Any, Any]] = list(zip(layers, states, strict=True))
    if nodes is None:
        return lambda: [module.extend(*tokens, state) for module, state in pairs]
    return lambda: [module.tree(*tokens, state, tree) for module, state in pairs]


def products(model: Any, count: int) -> Call:
    """The linear layers alone on so many tokens, the last one, which gives logits, included."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(1, count, layer.in_features) for layer in layers]
    return lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)]


# ------------------------------------------------------------------------------------------- speculation


TUNING: dict[str, Any] = dict(method="full", learning_rate=5e-4, new_learning_rate=1e-2, batch_size=4)


def speculation(sizes: Sizes) -> Iterator[Row]:
    """Every model decodes the same prompts plainly and with drafters, heads trained on that model."""
    base, tokenizer = lz.load_demo()
    text = encode(tokenizer, small_decoder.training_text())
    held_out = encode(tokenizer, small_decoder.held_out_text()[1])
    prompts = [held_out[600 * i : 600 * i + 200][None] for i in range(sizes.prompts)]
    models = {"softmax": base}
    for mechanism, steps in sizes.mechanisms:
        linear = lz.linearize(copy.deepcopy(base), mechanism=mechanism)
        if steps:
            lz.tune(linear, small_decoder.windows(text), max_steps=steps, **TUNING)
        models[f"{mechanism}, {steps} steps of tuning" if steps else mechanism] = linear
    for name, model in models.items():
        perplexity = small_decoder.perplexity(model, small_decoder.windows(held_out)[: 2 * sizes.prompts])
        heads = lz.train_heads(model, text[: sizes.training_tokens], epochs=sizes.epochs)
        lookup = lz.PromptLookup()
        drafters: dict[str, Any] = {"prompt lookup": lz.TreeSpeculation(lookup)}
        for budget in sizes.budgets:
            medusa = lz.Medusa(heads, lz.fit_tree(heads.rates, nodes=budget))
            drafters[f"heads, {budget} nodes"] = lz.TreeSpeculation(medusa)
            drafters[f"heads, {budget} nodes, and lookup"] = lz.TreeSpeculation([medusa, lookup])
        yield from _speculative_rows(sizes, name, model, prompts, drafters, perplexity)


def _speculative_rows(
    sizes: Sizes, name: str, model: Any, prompts: list[Tensor], drafters: dict[str, Any], perplexity: float
) -> Iterator[Row]:
    settings: dict[str, Any] = dict(
        max_new_tokens=sizes.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def plain() -> list[Tensor]:
        return [model.generate(prompt, **settings) for prompt in prompts]

    wanted = plain()
    tokens = len(prompts) * sizes.new_tokens
    best: Row | None = None
    for kind, how in drafters.items():
        passes = 0

        def drafted(how: Any = how) -> list[Tensor]:
            nonlocal passes
            out, passes = [], 0
            for prompt in prompts:
                out.append(model.generate(prompt, **settings, custom_generate=how))
                passes += how.passes
            return out

        same = sum(int((a == b).sum()) - a.numel() for a, b in zip(drafted(), wanted, strict=True)) == 0
        timed = compare({"drafted": drafted, "plain": plain}, sizes.seconds)
        times = timed["drafted"].ms, timed["plain"].ms
        note = (
            f"{1000 * tokens / times[0]:.0f} against {1000 * tokens / times[1]:.0f} tokens/s, "
            f"{tokens / passes:.2f} tokens per pass" + ("" if same else "; NOT the same tokens")
        )
        details = dict(model=name, drafter=kind, tokens=tokens, passes=passes, perplexity=perplexity)
        row = Row("speculation", f"{name}: {kind}", "speculative", "plain", *times, None, note, details)
        yield row
        if "heads" in kind and (best is None or (row.ratio or 0) > (best.ratio or 0)):
            best = row
    assert best is not None
    case = f"{name}, perplexity {perplexity:.1f}, best with heads: {best.details['drafter']}"
    goal = None if name == "softmax" else SPECULATION_GOAL
    yield Row(
        "speculation",
        case,
        best.ours,
        best.theirs,
        best.ours_ms,
        best.theirs_ms,
        goal,
        best.note,
        best.details,
    )


SECTIONS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "memory": memory,
    "decode": decode,
    "compiled": compiled,
    "trees": trees,
    "speculation": speculation,
}


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a dry run of every part, about two minutes")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--model", nargs="+", choices=("demo", "wide"), help="all but speculation, which is demo's"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    chosen = sizes or (QUICK if options.quick else Sizes())
    if options.model is not None:
        chosen = dataclasses.replace(chosen, models=tuple(options.model))
    measured: list[Row] = []
    failed: list[str] = []
    setting = environment()
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    for name in options.section:
        torch.manual_seed(0)
        print(f"\n{name}", flush=True)
        try:
            for row in SECTIONS[name](chosen):
                measured.append(row)
                print("\n".join(table([row]).splitlines()[-1:]), flush=True)
        except Exception:  # minutes of other sections are still to come, or were measured already
            traceback.print_exc()
            failed.append(name)
        if options.json is not None:
            write_json(options.json, dict(environment=setting, rows=[row.record() for row in measured]))
    print(table(measured))
    print(f"\n{summary(measured)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
