"""What every mechanism states about itself: how to build its module and which attentions it can carry."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..passes.site import Reason

if TYPE_CHECKING:
    from ..attention import AttentionModule, SiteSpec
    from ..config import LinearizeConfig

_REASONS = {
    "causal": Reason.MASK_UNSUPPORTED,
    "bidirectional": Reason.MASK_UNSUPPORTED,
    "cross": Reason.MASK_UNSUPPORTED,
    "window": Reason.MASK_UNSUPPORTED,
    "mask": Reason.MASK_UNSUPPORTED,
    "bias": Reason.BIAS_UNSUPPORTED,
    "alibi": Reason.BIAS_UNSUPPORTED,
    "softcap": Reason.SOFTCAP_UNSUPPORTED,
    "sinks": Reason.SINKS_UNSUPPORTED,
}
"""Everything a site may need of a mechanism, and the code to refuse it with.

"window": a causal or centred window; "mask": any other positional mask (chunks, arbitrary ones); "bias":
finite values added to the scores; "alibi": a bias known to be ALiBi.
"""

_DROPPABLE = frozenset({"softcap", "sinks", "alibi", "bias", "window"})


@dataclass(frozen=True)
class Mechanism:
    """A named replacement for softmax attention.

    formula: one line for people. build: makes the module of one site; the spec has passed `refusal`.
    supports: what it carries exactly as the site means it, among the keys of `_REASONS`.
    """

    name: str
    formula: str
    supports: frozenset[str]
    build: Callable[[SiteSpec, LinearizeConfig], AttentionModule]

    def refusal(
        self, spec: SiteSpec, terms: Collection[str] = (), approximate: Collection[str] = ()
    ) -> tuple[Reason, str] | None:
        """Why this mechanism cannot take the site's place, or None if it can.

        terms: what the site's scores hold beyond the spec: any of "bias", "alibi", "sinks", "mask".
        approximate: what the user allows to be dropped (`LinearizeConfig.approximate`).
        """
        needs = ["cross" if spec.cross else "causal" if spec.causal else "bidirectional"]
        needs += ["softcap"] if spec.softcap is not None else []
        needs += ["window"] if spec.window is not None else []
        for need in [*needs, *terms]:
            if need in self.supports or (need in _DROPPABLE and need in approximate):
                continue
            advice = (
                f'; approximate=("{need}",) leaves it out knowingly'
                if need in _DROPPABLE
                else "; keep its softmax"
            )
            return _REASONS[need], f"mechanism {self.name!r} cannot carry {need}{advice}"
        return None
