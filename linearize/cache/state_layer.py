"""The constant-size state as a layer of a transformers cache: `generate()` treats it like any other.

It takes the place of the layer that transformers made, as long as that is empty. `update` only counts: it
gives the new keys and values back, and the attention module brings the state up to date when it runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..common.checks import is_traced, require_true
from ..errors import InputError
from ..mechanisms.module import AttentionModule
from ..ops.attention import Lineage
from ..ops.state import States

_HIDDEN = (
    "the attention mask hides tokens that the cache took as visible, or the reverse, and a state cannot take "
    "them back; give the same mask for earlier tokens, or start from an empty cache"
)


class StateLayer(CacheLayerMixin):
    """State of one attention module. Rewinding (`crop`) is exact: see `activate_past_recording`.

    module: whose state it is; not kept alive. like: the empty layer whose place it takes. Beside static
    layers the masks have one width, `max_length` (default: what `like` holds), and the length is a tensor
    that compiled code advances in place. A pickle forgets whose state it was: the first module it fits takes
    it.
    """

    is_sliding = False
    is_croppable = True
    takes_trees = True
    supports_early_init = False
    _linearize_filled = True  # whatever it holds came from a converted owner, see `cache.check_not_foreign`

    def __init__(self, module: AttentionModule, like: Any, max_length: int | None = None) -> None:
        self.is_initialized = False
        self.instead_of = like
        self.is_compileable = bool(getattr(like, "is_compileable", False))
        self.max_cache_len = like.get_max_length() if max_length is None else max_length
        self.cumulative_length: int | Tensor = torch.tensor(0) if self.is_compileable else 0
        self.record_past = False
        self.states: States | None = None
        self.expected = False  # a converted owner is about to call `update`
        self._pending = 0  # tokens that `update` counted and `extend` has not seen
        self._writing = False  # stays true when the state's tensors were left half written
        self._skipped = False  # tokens were counted that the state does not hold
        # bool [B, W], the tokens that masks said are real; later columns are, and all where there is none.
        self._real: Tensor | None = None
        self._rows: dict[int, Tensor] = {}  # what `hear_row` was last given, by place
        self._hears = False  # masks are compared in the first layer of a model, for all of them
        self._module: weakref.ref[AttentionModule] | None = weakref.ref(module)
        self.tree: Lineage | None = None  # of the draft nodes that come next, see `draft`
        self._drafted: tuple[Tensor, Tensor, Tensor] | None = None
        self._kinds: list[torch.dtype] = []  # dtypes of the state's tensors
        self._sizes = (0, 0, 0)  # key/value heads, and features of a key and of a value
        self._committed: States | None = None  # while recording: the state at the last commit
        self._recorded: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []  # and the tokens since

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._sizes = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length = self.cumulative_length.to(self.device)
            torch._dynamo.mark_static_address(self.cumulative_length)
        module = self.module
        assert module is not None
        self.states = module.new_state(key_states.shape[0], dtype=self.dtype, device=self.device)
        assert self.states is not None
        self._kinds = [tensor.dtype for tensor in self.states.tensors()]
        if self.is_compileable:
            for tensor in self.states.tensors():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens `[B, Hkv, T, D]` and return them.

        Raises InputError for another batch size, dtype or device, and for a model that was not converted.
        """
        if not self.expected:
            raise InputError(
                "this cache belongs to a converted model and holds no keys and values for any other; start "
                "from an empty one"
            )
        self.expected = False
        if self._writing:
            raise InputError(
                "the cache's state was left half written by a call that ended midway (an exception or an "
                "interrupt); start from an empty cache and run the text again"
            )
        if self._skipped:
            raise InputError(
                "the cache counts a row of several documents, which nothing can continue; start from an "
                "empty cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._leave_inference_mode()
        assert self.states is not None
        if self.states.length.device == key_states.device:
            self.device = key_states.device  # the cache was moved there, with its model
        if (key_states.dtype, key_states.device) != (self.dtype, self.device):
            raise InputError(
                f"the cache was filled in {self.dtype} on {self.device} and the model now computes in "
                f"{key_states.dtype} on {key_states.device}; start from an empty cache"
            )
        if self._kinds != [tensor.dtype for tensor in self.states.tensors()]:
            raise InputError(
                "the cache's state was cast to another dtype than it was made in, and its sums are no longer "
                "what they were; start from an empty cache and run the text again"
            )
        if key_states.shape[0] != self.states.batch_size:
            raise InputError(
                f"the cache holds {self.states.batch_size} sequences and the model was called with "
                f"{key_states.shape[0]}; use a cache of its own for every batch size"
            )
        if self.tree is None:
            self.cumulative_length += key_states.shape[-2]
            self._pending = key_states.shape[-2]
        return key_states, value_states

    def extend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """Attention of the tokens that `update` counted; real: bool `[B, T]`, None when all are."""
        assert self.states is not None
        self.prefetch()
        if self.tree is not None:
            self._drafted = (query, key, value)
            return module.tree(query, key, value, self.states, self.tree)
        if self.record_past:
            self._recorded.append((query, key, value, real))
        self._writing = True
        output = module.extend(query, key, value, self.states, key_mask=real)
        self._writing, self._pending = False, 0
        return output

    def hear(self, mask: Tensor | None, count: int, window: int | None = None) -> None:
        """Take note of which of the last `count` tokens a mask says are real.

        mask: bool `[B, S]` over all tokens, None where all are real. window: of the site, before which the
        mask need not tell. Raises InputError (in a graph, an assertion) where it says of a token in the state
        that it is real and an earlier mask did not, or the reverse: what is in the state cannot be taken out
        again.
        """
        if torch.compiler.is_exporting():
            return  # an exported graph keeps nothing of its own from call to call
        self._hears = True
        start = self.cumulative_length - count
        first = 0 if window is None else start - window + 1
        if not self.is_compileable:
            assert not isinstance(start, Tensor) and not isinstance(first, Tensor)
            if self._real is not None or (mask is not None and start > 0):
                known = self._real_of(start, mask)
                said = torch.ones_like(known) if mask is None else mask[:, :start]
                require_true((known == said)[:, max(first, 0) :].all(), _HIDDEN)
            self._note(None if mask is None else mask[:, start : start + count], start)
            return
        real = self._static_real()
        columns = torch.arange(self.max_cache_len, device=real.device)
        said = torch.ones_like(real) if mask is None else mask[:, : self.max_cache_len]
        require_true(((real == said) | (columns >= start) | (columns < first)).all(), _HIDDEN)
        new = (columns >= start) & (columns < start + count)
        real.copy_(torch.where(new, said, real))

    def _note(self, new: Tensor | None, start: int) -> None:
        """new: bool `[B, count]`, the tokens from `start` on that are real; None where all are."""
        self._real = None if self._real is None else self._real[:, :start]  # `crop` may have taken some back
        if new is not None and (is_traced(new) or not bool(new.all())):
            self._real = torch.cat([self._real_of(start, new), new], 1)

    def _real_of(self, count: int, like: Tensor | None) -> Tensor:
        """Bool `[B, count]`, which of the first tokens are real."""
        if self._real is None:
            assert like is not None
            return like.new_ones(like.shape[0], count, dtype=torch.bool)
        return F.pad(self._real[:, :count], (0, max(count - self._real.shape[1], 0)), value=True)

    def _static_real(self) -> Tensor:
        if self._real is None:
            assert self.states is not None
            size = self.states.batch_size, self.max_cache_len
            self._real = torch.ones(size, dtype=torch.bool, device=self.device)
            torch._dynamo.mark_static_address(self._real)
        return self._real

    def hear_row(self, place: int, mask: Tensor, count: int) -> None:
        """As `hear` before `update` counts the tokens, for a mask whose meaning is not known here.

        mask: `[..., S]`, or `[..., T, S]` with a row for each new token; of whatever kind, at `place` among
        the masks of a call. Of earlier tokens it must say what it said in the call before; where there was
        none, what it says of each new token to itself.
        """
        start = int(self.get_seq_length())
        known = self._rows.get(place)
        if known is not None:
            width = min(start, known.shape[-1])
            same = mask[..., :width] == known[..., :width]
        elif mask.ndim > 2 and mask.shape[-2] == count:
            same = mask[..., :start] == mask.diagonal(start, -2, -1)[..., None]
        else:
            same = mask[..., :start] == mask[..., start + count - 1 : start + count]
        require_true(same.all(), _HIDDEN)
        row = mask[..., -1:, :] if mask.ndim > 2 else mask
        self._rows[place] = row[..., : start + count].clone()

    def skip(self) -> None:
        """The tokens that `update` counted do not enter the state, after which nothing can.

        Raises InputError where others came before.
        """
        if int(self.cumulative_length) > self._pending:
            raise InputError(
                "a row of several documents cannot continue a cache; start from an empty one, or leave it out"
            )
        self._pending, self._skipped = 0, True

    @property
    def keys(self) -> Tensor | None:
        """NaN in the shape of the keys that are not kept, for what copies caches row by row (Whisper's
        `generate`). A converted model refuses such a copy."""
        return self._stand_in(self._sizes[1])

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._stand_in(self._sizes[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the state; 0 before the first token."""
        return 0 if self.states is None else self.states.nbytes

    def _stand_in(self, features: int) -> Tensor | None:
        if self.states is None:
            return None
        nan = torch.full((), torch.nan, dtype=self.dtype, device=self.states.length.device)
        return nan.expand(self.states.batch_size, self._sizes[0], int(self.get_seq_length()), features)

    @property
    def module(self) -> Any | None:
        """Whose state it is; None when that is gone or not known any more."""
        return None if self._module is None else self._module()

    def claim(self, module: AttentionModule) -> None:
        """Check that it is `module` that the state belongs to. Raises InputError when it is not."""
        if self._module is None and self._fits(module):
            self._module = weakref.ref(module)
        if self.module is not module:
            raise InputError("this cache belongs to another model or layer; start from an empty one")

    def _fits(self, module: AttentionModule) -> bool:
        if self.states is None:
            return True
        new = module.new_state(self.states.batch_size, dtype=self.dtype, device=self.device)
        return new is not None and new.form == self.states.form

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer:
        memo[id(self)] = twin = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(twin, name, value if name == "_module" else copy.deepcopy(value, memo))
        copied = memo.get(id(self.module))
        if copied is not None:  # model and cache are copied together
            twin._module = weakref.ref(copied)
        return twin

    @torch.no_grad()
    def accept(self, path: Tensor) -> None:
        """Commit the nodes `path` `[B, P]` of the last tree, -1 for none; all rows advance by P columns."""
        module = self.module
        if self._drafted is None or self.states is None or module is None:
            raise InputError("no draft tree was run on this cache since the last accepted one")
        self._leave_inference_mode()
        self._writing = True
        module.commit(*self._drafted, self.states, path)
        if self._hears and not isinstance(self.cumulative_length, Tensor):
            self._note(path >= 0, self.cumulative_length)
        elif self._hears:
            columns = torch.arange(path.shape[1], device=path.device) + self.cumulative_length
            self._static_real().index_copy_(1, columns, path >= 0)
        self.cumulative_length += path.shape[1]
        self._drafted = None
        self._writing = False

    def call_failed(self) -> None:
        """A call ended with an exception: take back what was counted and never reached the state."""
        self.expected = False
        if not self._writing:
            self.cumulative_length -= self._pending
            self._pending = 0

    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_compileable:
            return self.max_cache_len, 0
        return int(self.cumulative_length) + query_length, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs: a copy of the state at the last commit, and the tokens since.

        `crop(-n)` goes back to the copy and replays all but the last n tokens, without their outputs; it then
        commits, and so does `crop(0)`.
        """
        if not self.record_past:
            self.record_past = True
            self._commit()

    @torch.no_grad()  # replaying is work of the kernels: outside a call there is nothing else to say so
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, exactly.

        Raises InputError, changing nothing, when that is too many, and for a positive number, which was once
        the length to keep.
        """
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}) is not supported: give the tokens to take back as -n")
        count = -tokens_to_remove
        if self.states is None:
            return
        self._leave_inference_mode()
        if not self.record_past:
            self.states.rewind(count)
        elif count:
            self._replay(count)
        self.cumulative_length -= count
        if self.record_past:
            self._commit()

    def _commit(self) -> None:
        self._committed = None if self.states is None else self.states.map(Tensor.clone)
        self._recorded = []

    def _replay(self, count: int) -> None:
        keep = sum(key.shape[2] for _, key, _, _ in self._recorded) - count
        if keep < 0:
            raise InputError(
                f"cannot take back {count} tokens: only {keep + count} came since the last commit"
            )
        module = self.module
        assert self.states is not None and module is not None
        self._writing = True
        if self._committed is None:
            self.states.clear()
        else:
            for tensor, old in zip(self.states.tensors(), self._committed.tensors(), strict=True):
                tensor.copy_(old)
        for query, key, value, real in self._recorded:
            size = min(keep, key.shape[2])
            if size > 0:
                path = torch.arange(size, device=key.device).expand(key.shape[0], -1)
                path = path if real is None else path.where(real[:, :size], -1)
                module.commit(*(x[:, :, :size] for x in (query, key, value)), self.states, path)
            keep -= size
        self._writing = False

    def reset(self) -> None:
        self._leave_inference_mode()
        if self.states is not None:
            self.states.clear()
        self._skipped = False
        self._real = None if self._real is None or not self.is_compileable else self._real.fill_(True)
        self._rows = {}
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0
        self._committed, self._recorded = None, []
        self._drafted, self._pending, self._writing = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.states is not None and self.states.length.device != self.device:
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def _leave_inference_mode(self) -> None:
        """Tensors of `torch.inference_mode` cannot be changed outside it; copies that are made here can."""
        if self.states is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.states.length.is_inference():  # they are made together
            self._map(Tensor.clone)
        if isinstance(self.cumulative_length, Tensor) and self.cumulative_length.is_inference():
            self.cumulative_length = self.cumulative_length.clone()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        batch = self.states.batch_size if self.states is not None else 0
        # A row may be one for the whole batch, or of batch and heads as one.
        self._rows = {
            place: row if row.shape[0] == 1 else function(row)
            for place, row in self._rows.items()
            if row.shape[0] in (1, batch)
        }
        if self.states is not None:
            self.states = self.states.map(function)
        if self._real is not None:
            self._real = function(self._real)
        if self._committed is not None:
            self._committed = self._committed.map(function)
        self._recorded = [
            (function(query), function(key), function(value), None if real is None else function(real))
            for query, key, value, real in self._recorded
        ]
