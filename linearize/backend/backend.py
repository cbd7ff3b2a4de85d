"""`torch.compile(model, backend="linearize")`: the passes inside a compiler, one graph at a time.

A dynamo backend is handed graphs, not models: it cannot add a parameter to a module it never sees. So the new
parameters belong to a `Backend`, which the user holds:

    backend = Backend(group_size=64)  # or backend="linearize" with options={...}, see `linearize_backend`
    compiled = torch.compile(model, backend=backend)
    compiled(x)  # the new parameters exist from the first call on
    optimizer = AdamW([*model.parameters(), *backend.parameters()])

A new shape is a new graph of the same owner, and after a graph break dynamo compiles a layer's code once and
runs it for every layer, with that layer's weights as inputs. So each compiled graph takes the new parameters
as further inputs, chosen at every call by *which* tensors its weights are (`owners.py`).

What a graph cannot show: state between calls. Decoding with a cache computes linear attention over the whole
cache, numerically right but in linear time per token; `linearize(model)` is the way to a constant-size state.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule

from ..convert.report import REFUSED, Candidate, Report, candidates, describe
from ..errors import ConfigError, RefusedError
from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec
from ..passes import find_attention, lower_attention, raise_attention
from ..passes.capture import CaptureError, to_dialect
from ..passes.dynamo import fake, fake_mode, retrace
from ..passes.site import MatchReport, Reason, Site
from ..planning.build import build_attention, parameter_dtype
from ..planning.config import LinearizeConfig
from ..planning.plan import child_name, problem_of, site_spec, stays_softmax
from .decode import is_cached_decode
from .owners import Entry, Place, anchors_of, graph_values
from .proof import Proof

log = logging.getLogger(__name__)


class Backend:
    """A dynamo backend that rewrites attention, and the owner of the parameters this adds.

    With mechanism "softmax" the compiled function computes what the model computes.

    Args:
        Args:
        config: a `LinearizeConfig` or a mapping of its fields. Unless it is a `LinearizeConfig`, `on_refusal`
            is "keep": what cannot be rewritten stays softmax, and in `report`. `layers` and `keep_softmax` go
            by the paths that dynamo shows: complete ones, unless a graph break inside a layer makes it start
            from that layer.
        inner: the backend that compiles the rewritten graph: a registered name such as "inductor",
            "aot_eager" or "eager", or a callable.
        trainable: False makes the new parameters constants.
        **settings: further fields of `LinearizeConfig`.

    Raises:
        ConfigError: the config has an unknown field or a wrong value, or `inner` is no backend.
    """

    def __init__(
        self,
        config: LinearizeConfig | Mapping[str, Any] | None = None,
        *,
        inner: str | Callable[..., Any] = "inductor",
        trainable: bool = True,
        **settings: Any,
    ) -> None:
        if isinstance(config, LinearizeConfig):
            self.config = dataclasses.replace(config, **settings) if settings else config
        else:
            self.config = LinearizeConfig.from_dict({"on_refusal": "keep", **(config or {}), **settings})
        if not callable(inner) and inner not in torch._dynamo.list_backends(exclude_tags=()):
            raise ConfigError(f"inner={inner!r} is no dynamo backend; see torch._dynamo.list_backends()")
        if inner == "linearize":
            raise ConfigError(
                "inner='linearize' would compile with itself; name the compiler to run after it"
            )
        self.inner = inner
        self.trainable = trainable
        self.notes: list[str] = []
        self._entries: list[Entry] = []
        self._hints: dict[tuple[str, int, int], Entry] = {}
        self._rows: dict[tuple[str, int, str], Candidate] = {}
        self._holder = nn.Module()
        self._pending: dict[str, Tensor] = {}

    # --- what the user asks -------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """Every candidate of every graph compiled so far; `notes` holds what concerns a whole graph."""
        return Report("torch.compile", self.config.mechanism, tuple(self._rows.values()))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The new parameters. They exist from the first call of the compiled model on."""
        return self._holder.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `parameters`, with the names a converted model has: `layers.0.attn.linear_attention.alpha`."""
        return self._holder.named_parameters()

    def modules(self) -> dict[str, AttentionModule]:
        """The attention modules by name."""
        return {n: m for n, m in self._holder.named_modules() if isinstance(m, AttentionModule)}

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._holder.state_dict(), **self._pending}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the new parameters by name; what has no module yet waits for the graph that makes it."""
        self._pending.update({name: value.detach().clone() for name, value in state.items()})
        for name, module in self.modules().items():
            self._load_pending(name, module)

    def to(self, *args: Any, **kwargs: Any) -> Backend:
        """Move the new parameters, as `nn.Module.to`; call it when the model moves."""
        self._holder.to(*args, **kwargs)
        return self

    # --- what dynamo calls --------------------------------------------------------------------------------

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Compile one graph. Raises RefusedError where a site is refused and `on_refusal` is "error"."""
        try:
            graph = to_dialect(gm, example_inputs)
            match = find_attention(graph)
        except CaptureError as error:
            self._refuse_graph(str(error))
            return self._compile(gm, example_inputs)
        places = self._plan(match, graph)
        if not places:
            return self._compile(gm, example_inputs)
        if self.config.mechanism == "softmax":
            return self._compile(raise_attention(graph), example_inputs)
        return self._lower(graph, places, example_inputs)

    def _lower(
        self, graph: GraphModule, places: Mapping[tuple[str, int], Place], example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Rewrite, lift what the site modules own to inputs of the graph, and compile that."""
        values = graph_values(graph)
        called: list[tuple[Place, nn.Module]] = []

        def factory(site: Site) -> nn.Module | None:
            place = places.get((site.path, site.ordinal))
            if place is None:
                return None
            called.append((place, self.module_of(place, values)))
            return called[-1][1]

        lowered = lower_attention(graph, factory)
        lifted: dict[str, Tensor] = {}
        states: list[tuple[Place, tuple[str, ...]]] = []
        done: set[nn.Module] = set()
        for number, (place, module) in enumerate(called):
            if module in done:  # shared layers call one module several times
                continue
            done.add(module)
            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            states.append((place, tuple(own)))
            lifted |= {f"attention_{number}.{name}": value for name, value in own.items()}
        flat = retrace(lowered, example_inputs, lift=tuple(lifted))
        mode = fake_mode(example_inputs)
        inputs = [*example_inputs, *(fake(mode, value) for value in lifted.values())]
        proof = Proof(graph, {key: self.module_of(place, values).spec for key, place in places.items()})
        return _Call(self, self._compile(flat, inputs), tuple(states), proof)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return lookup_backend(self.inner)(gm, list(example_inputs))

    def _plan(self, match: MatchReport, graph: GraphModule) -> dict[tuple[str, int], Place]:
        """The sites to rewrite, by (owner path, ordinal); every candidate goes into the report."""
        places: dict[tuple[str, int], Place] = {}
        refused: dict[tuple[str, int], tuple[str, str]] = {}
        slots: Counter[tuple[str, int]] = Counter()
        for site in match.sites:
            key = (site.path, site.ordinal)
            slot = slots[site.path, site.call]
            slots[site.path, site.call] += 1
            if stays_softmax(self.config, site.path, _layer_index(site.path)):
                continue
            problem = problem_of(site, self.config.at(site.path, _layer_index(site.path)), in_graph=True)
            if problem is None:
                found = self._place(site, slot, graph)
                if isinstance(found, Place):
                    places[key] = found
                    continue
                problem = found
            refused[key] = problem
        becomes = dict.fromkeys(places, describe(self.config))
        for row in candidates(match, refused, becomes):
            name = (row.path, row.ordinal, row.source)
            if row.verdict == REFUSED and row.reason != Reason.NOT_ATTENTION.value and name not in self._rows:
                log.warning("left as softmax: %s (%s): %s", row.path or "the model", row.source, row.message)
            self._rows[name] = row
        blocking = [r for r in match.refusals if r.reason is not Reason.NOT_ATTENTION]
        self._check_consistent(refused, match, graph)
        if self.config.on_refusal == "error" and (refused or blocking):
            texts = [f"{path or '(root)'}: {text}" for (path, _), (_, text) in refused.items()]
            texts += [f"{refusal.path or '(root)'}: {refusal.message}" for refusal in blocking]
            raise RefusedError(f"attention that cannot be rewritten: {'; '.join(texts)}", self.report)
        return places

    def _check_consistent(
        self, refused: Mapping[tuple[str, int], tuple[str, str]], match: MatchReport, graph: GraphModule
    ) -> None:
        """Refuse a graph that would run softmax where an earlier one of the same owner is linear."""
        texts = [(path, message) for (path, _), (_, message) in refused.items()]
        texts += [(refusal.path, refusal.message) for refusal in match.refusals]
        for path, message in texts:
            if any(
                entry.belongs_to(path, anchors_of(graph, path), graph_values(graph))
                for entry in self._entries
            ):
                raise RefusedError(
                    f"the attention of {path or 'the model'} was rewritten in an earlier graph and cannot be "
                    f"in this one: {message}. Softmax here and linear there would be silently wrong; for "
                    "decoding with a cache use linearize(model) instead of the backend.",
                    self.report,
                )

    def _place(self, site: Site, slot: int, graph: GraphModule) -> Place | tuple[str, str]:
        """Where and what to build for `site`, or (reason, sentence) where that is not certain."""
        anchors, values = anchors_of(graph, site.path), graph_values(graph)
        like: Any = site.value.node.meta["val"]
        if anchors and (first := values[anchors[0][0]]) is not None and first.is_floating_point():
            like = first
        place = Place(site.path, slot, anchors, site_spec(site), like.device, like.dtype)
        if self.config.mechanism == "softmax":
            return place
        known = self._find(place, values)
        if site.shapes["T"] == 1 and not place.spec.causal:
            if is_cached_decode(site):
                place = dataclasses.replace(
                    place, spec=dataclasses.replace(place.spec, causal=True, cross=False)
                )
            elif site.shapes["S"] == 1 and known is None:
                return (
                    Reason.SHAPE_UNKNOWN.value,
                    "one token alone does not show whether the attention is causal",
                )
        if known is not None and _kind(known.place.spec) != _kind(place.spec):
            return (
                Reason.SHAPE_UNKNOWN.value,
                f"in an earlier graph this owner's attention was {_kind(known.place.spec)!r}, here it is "
                f"{_kind(place.spec)!r}; one set of parameters cannot be both",
            )
        return place

    def _find(self, place: Place, values: Sequence[Any]) -> Entry | None:
        hint = (place.path, place.slot, id(values[place.anchors[0][0]]) if place.anchors else 0)
        likely = self._hints.get(hint)
        for entry in (likely, *self._entries) if likely is not None else self._entries:
            if entry.place.slot == place.slot and entry.belongs_to(place.path, place.anchors, values):
                self._hints[hint] = entry
                return entry
        # The owner's parameters may have been replaced (`load_state_dict(assign=True)`).
        same = [e for e in self._entries if (e.place.path, e.place.slot) == (place.path, place.slot)]
        return next((entry for entry in same if entry.orphaned), None)

    def module_of(self, place: Place, values: Sequence[Any]) -> AttentionModule:
        """The site's module, made on first sight. values: the inputs of the graph."""
        entry = self._find(place, values)
        if entry is None:
            with torch.inference_mode(False):
                dtype = parameter_dtype(place.dtype)
                own = self.config.at(place.path, _layer_index(place.path))
                module = build_attention(place.spec, own).to(device=place.device, dtype=dtype)
            module.requires_grad_(self.trainable)
            entry = Entry(place, module)
            self._entries.append(entry)
            self._load_pending(self._hold(place, module), module)
        for index, kin in place.anchors:
            if kin not in entry.owner or entry.owner[kin]() is None:
                entry.owner[kin] = weakref.ref(values[index])
        return entry.module

    def _hold(self, place: Place, module: AttentionModule) -> str:
        """Register `module` under the name it would have in a converted model; returns that name."""
        owner = self._holder
        for part in place.path.split(".") if place.path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        child, copies = child_name(place.slot), 1
        while child in owner._modules:  # after a graph break, layers are told apart by their weights only
            copies += 1
            child = f"{child_name(place.slot)}__{copies}"
        owner.add_module(child, module)
        return f"{place.path}.{child}" if place.path else child

    def _load_pending(self, name: str, module: AttentionModule) -> None:
        own = {key: f"{name}.{key}" for key in module.state_dict()}
        found = {key: self._pending.pop(full) for key, full in own.items() if full in self._pending}
        if found:
            module.load_state_dict(found, strict=False)

    def _refuse_graph(self, text: str) -> None:
        note = f"a graph was compiled as it is: {text}"
        if note not in self.notes:
            log.warning(note)
            self.notes.append(note)
        if self.config.on_refusal == "error":
            raise RefusedError(note, self.report)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A compiled graph together with the site modules whose tensors it takes after its own inputs, and with
    what is compared before it runs for the first time."""

    backend: Backend
    compiled: Callable[..., Any]
    states: tuple[tuple[Place, tuple[str, ...]], ...]
    proof: Proof

    def __call__(self, *args: Any) -> Any:
        self.proof.check(args)
        extra: list[Tensor] = []
        for place, names in self.states:
            module = self.backend.module_of(place, args)
            extra += [getattr(module, name) for name in names]
        return self.compiled(*args, *extra)


def linearize_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point behind `torch.compile(model, backend="linearize", options={...})`.

    Args:
        gm: the graph that dynamo captured.
        example_inputs: its inputs, real or fake tensors.
        options: fields of `LinearizeConfig`, and `inner` as for `Backend`. The dict is where this compiled
            function keeps its state: after the first call `options["backend"]` is its `Backend`, with
            `parameters()` and `report`; a `Backend` may also be put there beforehand. Without options there
            is no such place, and the new parameters are constants at their initial values.
        mode: None or "default".

    Returns:
        The compiled graph.

    Raises:
        ConfigError: an unknown option or mode.
    """
    if mode not in (None, "default"):
        raise ConfigError(
            f"backend='linearize' has no mode {mode!r}; choose one for the inner backend instead"
        )
    if options is None:
        return Backend(trainable=False)(gm, example_inputs)
    backend = options.get("backend")
    if backend is None:
        settings = {key: value for key, value in options.items() if key != "inner"}
        backend = options["backend"] = Backend(settings, inner=options.get("inner", "inductor"))
    if not isinstance(backend, Backend):
        raise ConfigError(f"options['backend'] must be a linearize Backend, got {type(backend).__name__}")
    return backend(gm, example_inputs)


def _kind(spec: SiteSpec) -> str:
    """What decides the shapes of a module's parameters and the meaning of its arguments."""
    kind = "cross" if spec.cross else "causal" if spec.causal else "bidirectional"
    return f"{kind}, heads={spec.num_heads}/{spec.num_key_value_heads}, dim={spec.head_dim}/{spec.value_dim}"


def _layer_index(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
