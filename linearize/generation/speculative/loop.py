"""The decoding loop: draft a tree, score it in one pass, accept a path, repeat.

With exact acceptance the result is that of plain decoding, whatever is drafted: with greedy decoding the same
tokens, with sampling the same distribution (and for one sequence and one seed the same tokens, as long as the
logits agree). A good draft only reduces the number of passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cache.draft_tree import accept, tree_logits
from ...common.checks import excerpt
from ...errors import ConfigError, InputError
from .acceptance import acceptance_rule
from .drafter import Draft, Drafter, Several
from .hidden import observe_hidden_states
from .sequence import Chooser, GeneratedSequence, Stop
from .tree import Tree


@dataclass
class SpeculationStats:
    """Counts of one call of `generate`.

    Attributes:
        passes: Forward passes after the prompt's.
        tokens: Generated tokens, including the ones that the prompt's pass gave.
        drafted: Drafted tokens.
        accepted: Drafted tokens that were accepted.
        depth: The depth of the drafts, summed over passes and sequences.
        rows: Sequences.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    depth: int = 0
    rows: int = 0
    scored: int = field(default=0, repr=False)  # trees: passes, counted for each sequence that is not done

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per sequence and pass; 1 is plain decoding."""
        return (self.tokens - self.rows) / self.scored if self.scored else 0.0

    @property
    def acceptance(self) -> float:
        """The share of the drafted depth that was accepted."""
        return self.accepted / self.depth if self.depth else 0.0


class TreeSpeculation:
    """Decoding by draft trees: `model.generate(..., speculative=TreeSpeculation(drafter))`.

    Unconverted models take it as `generate(..., custom_generate=...)`. There transformers gives it no
    streamer, so bind one: `functools.partial(speculation, streamer=streamer)`. It works with all settings of
    `generate` that choose one token at a time, but not with beam search.

    Args:
        drafter: What makes the drafts, see `Drafter`. The trees of several are joined to one.
        tree: Which guesses are tried, for a drafter that ranks its guesses by depth (`Medusa`). None for the
            drafter's own tree.
        acceptance: "exact", or a rule such as `Typical()`.

    Attributes:
        stats: Counts of the last call, also available as `passes`, `tokens`, `tokens_per_pass` and
            `acceptance`.

    Raises:
        ConfigError: The drafter makes its own trees, or `acceptance` is unknown.
    """

    def __init__(
        self,
        drafter: Drafter | Sequence[Drafter],
        tree: Tree | None = None,
        acceptance: Any = "exact",
    ) -> None:
        if tree is not None:
            if not hasattr(drafter, "with_tree"):
                raise ConfigError(f"{type(drafter).__name__} makes its own trees: leave out tree=")
            drafter = drafter.with_tree(tree)
        for one in drafter if isinstance(drafter, list | tuple) else [drafter]:
            if not hasattr(one, "propose"):
                raise ConfigError(
                    f"drafter must be one such as PromptLookup() or Medusa(heads), got {excerpt(one)}"
                )
        self.drafter: Drafter = Several(drafter) if isinstance(drafter, Sequence) else drafter
        self.rule = acceptance_rule(acceptance)
        self.stats = SpeculationStats()

    @property
    def passes(self) -> int:
        """Forward passes of the last call, after the prompt's."""
        return self.stats.passes

    @property
    def tokens(self) -> int:
        """Tokens that the last call generated."""
        return self.stats.tokens

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per sequence and pass in the last call; 1 is plain decoding."""
        return self.stats.tokens_per_pass

    @property
    def acceptance(self) -> float:
        """The share of the drafted depth that the last call accepted."""
        return self.stats.acceptance

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; `generate` calls this.

        Args:
            model: The model that generates.
            input_ids: int64 `[B, n]`, the prompts.
            logits_processor: The processors of `generate`.
            stopping_criteria: Those of `generate`.
            generation_config: That of `generate`.
            synced_gpus: Must be False.
            streamer: Gets the tokens of a single sequence as they come.
            **model_kwargs: Among them `past_key_values`, an empty cache, and `attention_mask`.

        Returns:
            int64 `[B, n + new]`, sequences that end early padded, or the output class of `generate` if asked
            for.

        Raises:
            InputError: Tree speculation cannot do what is asked for. Nothing has run then.
        """
        cache = model_kwargs.get("past_key_values")
        _check(model, input_ids, cache, logits_processor, generation_config, synced_gpus, streamer)
        self.drafter.start(model)
        needs_hidden = self.drafter.needs_hidden
        mask = model_kwargs.get("attention_mask")
        columns = torch.ones_like(input_ids) if mask is None else mask
        real, stop = columns.bool(), Stop(stopping_criteria)
        rows = [GeneratedSequence(ids, keep, stop) for ids, keep in zip(input_ids, real, strict=True)]
        chooser = Chooser(logits_processor, generation_config.do_sample)
        self.stats = stats = SpeculationStats(rows=len(rows))
        with observe_hidden_states(model, needs_hidden) as states:
            logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
            hidden = states.hidden[:, -1] if needs_hidden else None
            for row, scores in zip(rows, logits, strict=True):
                row.emit(chooser.pick(chooser.scores(row.ids, scores)))
            sent = _stream(streamer, rows[0], len(input_ids[0]))
            while not all(row.done for row in rows):
                drafts = self._drafts(rows, hidden, logits.shape[-1])
                size = max(len(tokens) for tokens, _ in drafts)
                tokens = _padded([tokens for tokens, _ in drafts], size, 0, input_ids.device)
                parents = _padded([parents for _, parents in drafts], size, -1, torch.device("cpu"))
                logits = tree_logits(model, cache, tokens, parents, columns)
                paths = [
                    [] if row.done else self.rule.accept_path(row, draft, scores[: len(draft[0])], chooser)
                    for row, draft, scores in zip(rows, drafts, logits, strict=True)
                ]
                path = _padded(paths, max(map(len, paths)), -1, input_ids.device)
                accept(cache, path)
                columns = torch.cat([columns, (path >= 0).to(columns.dtype)], 1)
                if hidden is not None:
                    last = path.amax(1).clamp_min(0) if len(rows) > 1 else path[:, -1]
                    hidden = states.hidden[torch.arange(len(rows), device=last.device), last]
                self._count(stats, drafts, paths)
                sent = _stream(streamer, rows[0], sent)
        stats.tokens = sum(row.generated for row in rows)
        if streamer is not None:
            streamer.end()
        return _output(rows, cache, generation_config)

    def _drafts(self, rows: list[GeneratedSequence], hidden: Tensor | None, vocabulary: int) -> list[Draft]:
        """A tree for every row: its last token, which the model has not seen yet, and below it the draft."""
        drafts = self.drafter.propose([row.known for row in rows], hidden)
        if len(drafts) != len(rows):
            raise InputError(f"the drafter gave {len(drafts)} drafts for {len(rows)} sequences")
        return [_below(row, draft, vocabulary) for row, draft in zip(rows, drafts, strict=True)]

    def _count(self, stats: SpeculationStats, drafts: list[Draft], paths: list[list[int]]) -> None:
        stats.passes += 1
        for (tokens, parents), path in zip(drafts, paths, strict=True):
            if path:
                depth = [0] * len(tokens)
                for node, parent in enumerate(parents):
                    depth[node] = depth[parent] + 1 if parent >= 0 else 0
                stats.scored += 1
                stats.drafted += len(tokens) - 1
                stats.accepted += len(path) - 1
                stats.depth += max(depth)


def _below(row: GeneratedSequence, draft: Draft, vocabulary: int) -> Draft:
    """The row's last token with a draft below it; any single node for a row that is done.

    Raises InputError for a draft that is malformed. That parents come first is checked with the whole tree.
    """
    if row.done:
        return [0], [-1]
    tokens, parents = draft
    if len(tokens) != len(parents):
        raise InputError(f"a draft has as many parents as tokens, not {len(parents)} and {len(tokens)}")
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise InputError(
            f"tokens {min(tokens)} to {max(tokens)} were drafted, but the model has {vocabulary}: the "
            "drafter has another vocabulary"
        )
    return [int(row.known[-1]), *tokens], [-1, *(parent + 1 for parent in parents)]


def _padded(lists: list[list[int]], size: int, value: int, device: torch.device) -> Tensor:
    return torch.tensor([items + [value] * (size - len(items)) for items in lists], device=device)


def _stream(streamer: Any, row: GeneratedSequence, sent: int) -> int:
    """Give the streamer the row's tokens from column `sent` on, one at a time as `generate` does."""
    if streamer is not None:
        for token in row.ids[sent:].cpu().split(1):
            streamer.put(token)
    return row.ids.shape[0]


def _output(rows: list[GeneratedSequence], cache: Any, generation_config: Any) -> Any:
    pad = generation_config._pad_token_tensor
    sequences = torch.nn.utils.rnn.pad_sequence(
        [row.ids for row in rows], batch_first=True, padding_value=0 if pad is None else int(pad)
    )
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)


_NEEDS_BATCH = (
    "PrefixConstrainedLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
)
"""Processors that treat each row of a batch differently. Here they get the rows one at a time."""


def _check(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    processors: Any,
    generation_config: Any,
    synced_gpus: bool,
    streamer: Any,
) -> None:
    """Raise InputError for what tree speculation cannot do."""
    config = generation_config
    if config.num_beams > 1:
        raise InputError("tree speculation does not do beam search: give num_beams=1")
    if synced_gpus:
        raise InputError("tree speculation runs in one process: give synced_gpus=False")
    if model.config.is_encoder_decoder:
        raise InputError("tree speculation is for decoders, and this is an encoder-decoder")
    if cache is None or cache.get_seq_length() > 0:
        raise InputError("tree speculation starts from an empty cache: use_cache=True, no past_key_values")
    wanted = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if config.return_dict_in_generate and getattr(config, name)
    ]
    if wanted:
        raise InputError(f"tree speculation does not return {', '.join(wanted)}: leave that out")
    if len(input_ids) > 1:
        if streamer is not None:
            raise InputError("a streamer takes one sequence: give a batch of one")
        for processor in processors:
            if type(processor).__name__ in _NEEDS_BATCH:
                raise InputError(
                    f"{type(processor).__name__} needs the whole batch, and tree speculation processes rows "
                    "one at a time: generate them one by one"
                )
