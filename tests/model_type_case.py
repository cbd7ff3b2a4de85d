"""One model type from end to end: build, convert exactly and compare, convert, generate, save, load.

Shared by `test_model_types.py`, which asserts, and `benchmarks/model_types.py`, which writes the table.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from linearize.passes.site import Reason
from survey_case import real_tokens, relative_error
from torch import Tensor, nn
from zoo.model_types import NotBuilt, build

import linearize as lz
from linearize.common.running import call, generates, quiet_run, without_cache
from linearize.convert.inputs import example_inputs
from linearize.errors import InputError, LinearizeError, NoAttentionError, RefusedError, VerificationError
from linearize.planning.state import state_of

TOLERANCE = 1e-4
"""Of |with exact softmax - original| / max(1, |original|)."""
TOKENS = 4

Result = dict[str, Any]
Inputs = Mapping[str, Any]


class Ended(Exception):
    """The end of a type, with its outcome and why."""

    def __init__(self, outcome: str, why: object = "") -> None:
        super().__init__(outcome, why)
        self.outcome, self.why = outcome, " ".join(str(why).split())[:700]


def examine(model_type: str, tell: Callable[[Result], None] = lambda _: None) -> Result:
    """What becomes of the type; `tell` gets the result so far before each stage, should the stage never end.

    Outcomes: `not built`, `no inputs`, `no attention`, `refused`, `converted`, `kept` (in part softmax); and
    faults: `wrong` (numbers), `raw` (an exception that is not ours), `failed` (one of ours that is no
    refusal). `exact` and `default` say the same of both conversions.
    """
    result: Result = {"type": model_type, "seconds": {}}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        result["stage"] = name
        tell(result)
        start = time.perf_counter()
        try:
            yield
        finally:
            result["seconds"][name] = round(time.perf_counter() - start, 2)

    try:
        _examine(model_type, result, stage)
    except Ended as end:
        result.update(outcome=end.outcome, why=end.why)
    except NoAttentionError as error:
        result.update(outcome="no attention", why=str(error))
    except RefusedError as error:
        result.update(outcome="refused", why=str(error)[:700])
    except LinearizeError as error:
        result.update(outcome="failed", why=f"{type(error).__name__}: {error}"[:700])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages" not in f.filename]
        text = f"{type(error).__name__}: {error}"
        result.update(outcome="raw", why=" ".join(text.split())[:500], where=where[-4:])
    return result


def _examine(model_type: str, result: Result, stage: Callable[[str], Any]) -> None:
    with stage("build"):
        try:
            model = build(model_type)
        except NotBuilt as error:
            raise Ended("not built", error) from error
        result["class"] = type(model).__name__
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with stage("inputs"):
        try:
            examples = example_inputs(model)
        except InputError as error:
            raise Ended("no inputs", error) from error
        result["inputs"] = sorted(examples[-1])
        wanted = outputs(model, examples)
        if relative_error(outputs(model, examples), wanted) > TOLERANCE:
            raise Ended("no inputs", "the original differs from itself from call to call")
        spoken = generated(model, examples[0])
    with stage("exact"):
        exact, result["exact"] = converted(copy.deepcopy(model), mechanism="softmax")
        error = relative_error(outputs(exact, examples), wanted)
        result["error"] = error
        if not error <= TOLERANCE:
            raise Ended("wrong", f"exact softmax differs by {error:.1e}")
        said = generated(exact, examples[0]) if spoken is not None else None
        if spoken is not None and (said is None or not torch.equal(said, spoken)):
            raise Ended("wrong", f"exact softmax generates {said} in place of {spoken}")
        del exact
    with stage("default"):
        linear, result["default"] = converted(model)
        plan = state_of(linear).plan
        result["sites"] = sum(site.calls for site in plan.sites)
        result["left"] = dict(Counter(s.reason for s in plan.skipped if s.reason != Reason.NOT_ATTENTION))
        result["why left"] = next((s.message for s in plan.skipped if s.reason in result["left"]), "")[:300]
        found = outputs(linear, examples)
        for before, after in zip(wanted, found, strict=True):
            if before.shape != after.shape or before.isfinite().all() > after.isfinite().all():
                raise Ended("wrong", f"{tuple(after.shape)} in place of {tuple(before.shape)}, or not finite")
        if spoken is not None and generated(linear, examples[0], must=True) is None:
            raise Ended("failed", "it no longer generates")
        result["generates"] = spoken is not None
    with stage("save"), tempfile.TemporaryDirectory() as folder:
        lz.save(linear, folder)
        loaded = lz.load(folder).eval()
        for before, after in zip(found, outputs(loaded, examples), strict=True):
            if not torch.equal(before.nan_to_num(), after.nan_to_num()):
                raise Ended("wrong", f"loaded it differs by {(before - after).abs().max():.1e}")
    kept = result["left"] or result["default"]["kept"]
    result.update(outcome="kept" if kept else "converted", why=result["default"]["why"] or result["why left"])


def converted(model: nn.Module, **settings: Any) -> tuple[nn.Module, Result]:
    """The model linearized, with `on_refusal="keep"` where it is refused without, and whether so and why."""
    try:
        return lz.linearize(model, **settings), {"kept": False, "why": ""}
    except (RefusedError, VerificationError) as error:
        if "keep" not in str(error):
            raise
        why = " ".join(str(error).split())
    return lz.linearize(model, on_refusal="keep", **settings), {"kept": True, "why": why[:600]}


def outputs(model: nn.Module, examples: Sequence[Inputs]) -> list[Tensor]:
    """The floating outputs of every example at real tokens."""
    found: list[Tensor] = []
    with quiet_run(model):
        for example in examples:
            torch.manual_seed(0)
            output = call(model, without_cache(model, example))
            found += [x.clone() for x in real_tokens(_without_cache(output), example)]
    return found


def _without_cache(output: Any) -> Any:
    """Caches are no outputs, and those of a converted model are of another form."""
    if isinstance(output, Mapping):
        return {name: value for name, value in output.items() if "past" not in name and "cache" not in name}
    return output


def generated(model: Any, example: Inputs, must: bool = False) -> Tensor | None:
    """Tokens that the model's own greedy decoding gives; None where it does not decode.

    must: raise what it raises.
    """
    if not generates(model):
        return None
    prompt = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in example.items()
        if not name.startswith(("decoder_", "labels"))
    }
    try:
        with quiet_run(model):
            found = model.generate(**prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    except Exception:
        if must:
            raise
        return None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None
