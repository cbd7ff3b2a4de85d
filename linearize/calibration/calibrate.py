"""Calibration: fitting the new parameters of a converted model to the softmax attention that it replaced.

The output of each head is affine in its local factor, alpha and convolution taps, or in the tail of
`augmented`, so the best fit to the outputs of softmax is a ridge regression and no gradient is needed. The
batches pass through once. Each site is fitted on what it gets while all sites before it give what their fits
have found so far, as in the model that is used later: fits on the activations of the original make every
layer better and the model worse. A fit that does not help on data that it has not seen is not kept, head by
head (`regression.py`) and, on batches that are held out, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..common.batches import batches_of, tokens_in
from ..common.checks import require_number, require_whole
from ..common.given import cause, check_names
from ..common.progress import bar
from ..common.running import quiet_run, without_cache
from ..common.tables import Grid, Printed, alike
from ..errors import InputError, InvalidModelError, LinearizeError
from ..planning.state import state_of
from . import held_out
from .held_out import ByLength
from .observers import watching
from .site_fit import Fit

TOKENS = 50_000
"""The default number of tokens that are read; far fewer give much the same fit."""
_HELD_OUT = 5
"""Every so many batches one is held out."""
_UNUSED = "what is fitted took no part on these batches: give longer ones"


@dataclass(frozen=True)
class SiteFit:
    """The fit of one attention site.

    Attributes:
        name: The path of the attention module.
        before: |linear - softmax| / |softmax| of the outputs, with the parameters as they were.
        after: The same with the fit, each batch by the fit to those before it.
        left_out: Why the site was not fitted, or the fit not kept; empty if it was.
    """

    name: str
    before: float = float("nan")
    after: float = float("nan")
    left_out: str = ""


@dataclass(frozen=True)
class Calibration(Printed):
    """What `calibrate` did.

    Attributes:
        tokens: The number of tokens that were read, held-out ones included.
        sites: The fit of every attention site.
        held_out: Perplexity on the batches that were held out, before and after, by position; empty where
            there were fewer than five batches, or where the model predicts no tokens.
    """

    tokens: int
    sites: tuple[SiteFit, ...]
    held_out: tuple[ByLength, ...] = ()

    def blocks(self) -> Iterator[Grid | str]:
        fitted = [(x.name, f"{x.before:.3f}", f"{x.after:.3f}") for x in self.sites if not x.left_out]
        others = alike((x.name, "", x.left_out) for x in self.sites if x.left_out)
        yield Grid(("site", "error before", "after"), [*fitted, *others])
        yield f"{self.tokens} tokens; errors are relative to the output of the softmax attention"
        if self.held_out:
            yield Grid(
                ("held-out positions", "perplexity before", "after"),
                [(f"{x.first} to {x.last}", f"{x.before:.3f}", f"{x.after:.3f}") for x in self.held_out],
            )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | Tensor | Mapping[str, Any],
    *,
    max_tokens: int = TOKENS,
    ridge: float | None = None,
    sequential: bool = True,
    progress: bool | None = None,
) -> Calibration:
    """Fit the new parameters of a freshly converted model to its original attention, in place.

    Do this before any tuning, because the fit is to softmax attention with the model's present weights. Every
    fifth batch is held out, and ends by saying what the fit did to it: layers whose fit makes any range of
    positions worse are put back. If this raises, the model is as it was before.

    Args:
        model: A converted model.
        batches: Dicts of the model's keyword arguments, or token ids int64 `[B, T]`, of any lengths, or one
            of these alone; they are moved to the model's device.
        max_tokens: Batches are read until this number of tokens is reached.
        ridge: How strongly parameters are pulled towards their present values, relative to the evidence for
            each. Chosen for each head when omitted.
        sequential: Fit each layer on what it gets behind the layers that are fitted already. False: on what
            it gets in the original, so that its fit does not depend on which other layers are converted;
            nothing is held out then.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        The error of every attention site before and after the fit, and held-out perplexity.

    Raises:
        InvalidModelError: The model is not converted, or has nothing to fit.
        InputError: A batch does not run, or the batches never reach some attention or give values that are
            not finite.
    """
    require_whole("max_tokens", max_tokens)
    require_number("ridge", ridge, "a number, 0 or more, or None", lambda value: value >= 0, optional=True)
    sites = state_of(model).plan.sites
    fits = {site.name: Fit(model.get_submodule(site.name), site, ridge, sequential) for site in sites}
    able = {name: fit for name, fit in fits.items() if not fit.left_out}
    if not able:
        reasons = {fit.left_out for fit in fits.values()}
        raise InvalidModelError(f"nothing can be calibrated: {'; '.join(sorted(reasons))}")
    tokens, kept = 0, []
    watchers = {site: able[site.name] for site in sites if site.name in able}
    try:
        with quiet_run(model):
            with watching(model, watchers), bar("calibrate", max_tokens, progress, "tokens") as tick:
                for number, given in enumerate(batches_of(batches), 1):
                    if sequential and number % _HELD_OUT == 0 and held_out.predicts(model, given):
                        kept.append(given)
                    else:
                        forward(model, given)
                    tokens += tokens_in(given)
                    tick(tokens_in(given))
                    if tokens >= max_tokens:
                        break
            if not tokens:
                raise InputError("there is no batch to calibrate on: the attention was never called")
            errors = {name: fit.finish() for name, fit in able.items()}
            unused = {name: _UNUSED for name, fit in able.items() if not fit.evidence}
            worse, by_length = held_out.settle(model, kept, able, forward)
    except BaseException:
        for fit in able.values():
            fit.restore()
        raise
    reports = {name: SiteFit(name, left_out=fit.left_out) for name, fit in fits.items()}
    reports |= {name: SiteFit(name, *errors[name], left_out=(worse | unused).get(name, "")) for name in able}
    return Calibration(tokens, tuple(reports.values()), by_length)


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's output on one batch, on its device, without a cache.

    Raises InputError if the model does not run on it.
    """
    check_names(model, inputs)
    device = next((p.device for p in model.parameters()), None)
    placed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    try:
        return model(**without_cache(model, placed))
    except LinearizeError:
        raise
    except Exception as error:
        why = cause(model, inputs, error)
        raise InputError(f"the model does not run on a batch: {why}") from error
