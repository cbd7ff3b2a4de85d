"""`recall`: does a decoder find again what stood far back? What a state of constant size costs is said here.

Two tests on text that is made here, the same for every model with one tokenizer:

    passkey   one number somewhere in sentences that have nothing to do with it
    fact      one of twenty facts ("The mayor who built the bridge was Novak.") spread in such sentences

The question ends where the answer begins, and an answer is right when greedy decoding writes all of it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import require, require_number, require_whole, several
from ..common.progress import bar
from ..common.running import quiet_run, without_cache
from ..common.tables import Grid, Printed
from ..common.text import check_tokenizer
from ..errors import InputError, InvalidModelError
from .compared import Compared, check_vocabulary, kind_of, positions
from .result import carry_record, describe, fingerprint
from .speed import device_of

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TASKS = ("passkey", "fact")
KIND = "recall"
VERSION = 1
LEAST = 256
"""Tokens of the shortest context."""
_WHO = ("The baker", "A teacher", "The old sailor", "Her neighbour", "The gardener", "A student", "My uncle")
_DID = ("walked to", "looked at", "wrote about", "came back from", "waited near", "painted", "asked about")
_WHAT = ("the river", "the market", "a small house", "the garden", "the station", "an empty road", "the sea")
_WHEN = ("in the morning", "after lunch", "before it rained", "last winter", "on a quiet day", "every week")
_NAMES = (
    *("Morton", "Alvarez", "Kimura", "Novak", "Jensen", "Rossi", "Dubois", "Okafor", "Larsen", "Haddad"),
    *("Weber", "Silva", "Moreau", "Castillo", "Lindgren", "Petrov", "Brennan", "Tanaka", "Fischer", "Romano"),
)
_FACTS = (
    "The captain of the ship Aurora was called",
    "The first owner of the mill was named",
    "The doctor who came on Sunday was",
    "The best violin in town was made by",
    "The letter under the floor was signed by",
    "The winner of the long race was",
    "The house with the blue roof belongs to",
    "The song about the comet was written by",
    "The bread at the wedding was baked by",
    "The stolen bicycle was found by",
    "The lighthouse keeper's name is",
    "The chess champion of the village is",
    "The map of the cave was drawn by",
    "The garden behind the church was planted by",
    "The oldest book in the library was printed by",
    "The mayor who built the bridge was",
    "The lost dog was brought back by",
    "The painting of the two horses is by",
    "The clock in the tower was repaired by",
    "The teacher of the deaf children is",
)
_AT_ONCE = 4
"""Questions that are asked at once: as many copies of the cache are in memory."""


@dataclass(frozen=True)
class Answers:
    """How one model answered the questions about one depth.

    Attributes:
        right: The share of the questions whose answer greedy decoding writes in full.
        likelihood: The mean log-likelihood of a token of the right answers, in nats.
    """

    right: float
    likelihood: float


@dataclass(frozen=True)
class Depth:
    """The questions of one test about one depth.

    Attributes:
        task: "passkey" or "fact".
        depth: Where the answer stood, as a share of the context.
        questions: How many there were.
        model: The answers of the model.
        reference: The answers of the reference.
    """

    task: str
    depth: float
    questions: int
    model: Answers
    reference: Answers | None = None


@dataclass(frozen=True)
class Recall(Printed):
    """The result of `recall`. It prints as a table.

    Attributes:
        length: Tokens of context.
        model: The class of the model, and the mechanism of its attention.
        reference: The same of the reference; None without one.
        rows: The answers, by test and depth.
        weights: A fingerprint of the weights that were measured.
    """

    length: int
    model: str
    reference: str | None
    rows: tuple[Depth, ...]
    weights: str = ""

    def accuracy(self, task: str, *, reference: bool = False) -> float:
        """The share of right answers of one test, all depths together."""
        rows = [row for row in self.rows if row.task == task]
        sides = [row.reference if reference else row.model for row in rows]
        found = [side.right * row.questions for side, row in zip(sides, rows, strict=True) if side]
        if not found:
            raise InputError(f"no answers to {task!r}{' of a reference' if reference else ''}")
        return sum(found) / sum(row.questions for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"version": VERSION, "kind": KIND, **dataclasses.asdict(self), "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recall | None:
        """The inverse of `to_dict`; None for what is no such record of this version."""
        try:
            fields = dict(data)
            if (fields.pop("version"), fields.pop("kind")) != (VERSION, KIND):
                return None
            found = cls(**{**fields, "rows": tuple(_depth(row) for row in fields["rows"])})
            return found if found.table() and found.note else None  # what cannot be written is no figure
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None

    def attach(self, model: nn.Module) -> None:
        """Store these answers in the model, as `Evaluation.attach` does."""
        carry_record(model, self.to_dict())

    def table(self) -> list[list[str]]:
        """The cells of a table: headings, then a line per test and depth."""
        sides = [self.model] if self.reference is None else [f"{self.reference}, original", self.model]
        lines = [["test", "depth", "questions"]]
        lines[0] += [f"{what}: {side}" for what in ("right", "nats per token") for side in sides]
        for row in self.rows:
            answers = [x for x in (row.reference, row.model) if x is not None]
            cells = [f"{x.right:.0%}" for x in answers] + [f"{x.likelihood:.2f}" for x in answers]
            lines.append([row.task, f"{row.depth:.0%}", str(row.questions), *cells])
        return lines

    @property
    def note(self) -> str:
        """What was asked, in a sentence."""
        return (
            f"{self.length:,} tokens of context. An answer is right when greedy decoding writes all of it; "
            "depth is where in the context it stood, 0% the beginning. passkey: one number in other text; "
            "fact: one of twenty facts spread in such text, counted at the nearest depth."
        )

    def blocks(self) -> Iterator[Grid | str]:
        headings, *lines = self.table()
        yield Grid(headings, lines)
        yield self.note


def recall(
    model: nn.Module,
    tokenizer: Any,
    reference: nn.Module | None = None,
    *,
    length: int = 4096,
    depths: Sequence[float] | float = DEPTHS,
    trials: int = 1,
    tasks: Sequence[str] | str = TASKS,
    seed: int = 0,
    progress: bool | None = None,
) -> Recall:
    """Ask a decoder for what stood at several depths of a long context.

    The text is made here in English from `seed`, without a download. A context is read once and then
    continued by the questions, from the cache, as in use. A trial of "passkey" reads as many contexts as
    there are depths, a trial of "fact" one for all depths.

    Args:
        model: A transformers decoder, converted or not.
        tokenizer: Its tokenizer.
        reference: What to compare with, such as the original, which gets the same questions.
        length: Tokens of context.
        depths: Where the answers stand, each from 0, the beginning, to 1.
        trials: How often everything is asked, each time with other text.
        tasks: Which of the tests to make: "passkey", "fact".
        seed: Of the text.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        The share of right answers by test and depth; it prints as a table.

    Raises:
        InvalidModelError: A model is no transformers decoder.
        ConfigError: A setting is out of range.
        InputError: A model has no room for the context, or the tokenizer is another model's.
    """
    compared = Compared(model, reference)
    for live in compared.all:
        if kind_of(live) != "decoder":
            raise InvalidModelError(f"recall asks decoders, and {type(live).__name__} is an {kind_of(live)}")
    check_tokenizer(tokenizer)
    require_number("length", length, f"{LEAST} or more tokens", lambda value: value >= LEAST)
    require_whole("trials", trials)
    depths = (depths,) if isinstance(depths, int | float) else tuple(depths)
    inside = len(depths) > 0 and all(0 <= depth <= 1 for depth in depths)
    require(inside, "depths", depths, "one or more numbers from 0 to 1")
    tasks = several(tasks)
    known = len(tasks) > 0 and set(tasks) <= set(TASKS)
    require(known, "tasks", tasks, f"some of {', '.join(TASKS)}")
    room = min(map(positions, compared.all))
    if length > room:
        raise InputError(f"the models have room for {room} tokens: give length={room} or less")
    rows = []
    with (
        quiet_run(model),
        quiet_run(model if reference is None else reference),
        bar("recall", None, progress, "contexts") as tick,
    ):
        for task in dict.fromkeys(tasks):
            found: list[list[list[tuple[bool, float]]]] = [[[] for _ in depths] for _ in compared.all]
            for trial in range(trials):
                draw = random.Random(f"{seed} {task} {trial}")
                for asked in _contexts(task, _Words(tokenizer), length, depths, draw):
                    check_vocabulary(compared, asked.context)
                    tick(1)
                    for side, live in enumerate(compared.all):
                        for place, answer in zip(asked.places, _answers(live, asked), strict=True):
                            found[side][place].append(answer)
            for place, depth in enumerate(depths):
                sides = [_together(side[place]) for side in found]
                rows.append(Depth(task, float(depth), len(found[0][place]), *sides))
    described = None if reference is None else describe(reference)
    return Recall(length, describe(model), described, tuple(rows), fingerprint(model))


def _depth(data: Mapping[str, Any]) -> Depth:
    fields = dict(data)
    reference = fields.pop("reference")
    return Depth(
        **{**fields, "model": Answers(**fields["model"])},
        reference=None if reference is None else Answers(**reference),
    )


def _together(answers: Sequence[tuple[bool, float]]) -> Answers:
    right, likelihood = zip(*answers, strict=True)
    return Answers(sum(right) / len(right), sum(likelihood) / len(likelihood))


class _Words:
    """Token ids of sentences, each with the space before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        whole = list(tokenizer("a")["input_ids"])
        first = getattr(tokenizer, "bos_token_id", None)
        self.start = whole[:1] if first is not None and whole[:1] == [first] else []

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(f" {text}", add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class _Asked:
    """A context int64 `[n]`, and for each question the index of its depth, its ids and its answer's."""

    context: Tensor
    places: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


def _contexts(
    task: str, words: _Words, length: int, depths: Sequence[float], draw: random.Random
) -> Iterator[_Asked]:
    """The contexts of one trial; each with its question is `length` tokens long, or up to a sentence less."""
    if task == "fact":
        yield _facts(words, length, depths, draw)
        return
    for place, depth in enumerate(depths):
        key = str(draw.randint(10_000, 99_999))
        question, answer = words("What is the pass key? The pass key is"), words(key)
        needle = words(f"The pass key is {key}. Remember it. {key} is the pass key.")
        room = length - len(words.start) - len(needle) - len(question) - len(answer)
        filler = [words(_sentence(draw)) for _ in range(room)]
        before, after = _filled(filler, room, depth)
        yield _Asked(torch.tensor([*words.start, *before, *needle, *after]), [place], [question], [answer])


def _sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN)) + "."


def _filled(sentences: Sequence[list[int]], room: int, depth: float) -> tuple[list[int], list[int]]:
    """As many whole sentences as there is room for: the ids before `depth` of it, and those after."""
    before, after = list[int](), list[int]()
    for ids in sentences:
        if len(before) + len(after) + len(ids) > room:
            break
        part = before if len(before) + len(ids) <= depth * room else after
        part += ids
    return before, after


def _facts(words: _Words, length: int, depths: Sequence[float], draw: random.Random) -> _Asked:
    """Facts at even distances, with other sentences between them; all are asked for."""
    known = list(zip(draw.sample(_FACTS, len(_FACTS)), draw.sample(_NAMES, len(_NAMES)), strict=False))
    longest = max(len(words(f"{fact} {name}.")) for fact, name in known)
    room = length - len(words.start) - longest
    known = known[: max(1, room // (3 * longest))]
    ids, starts = list(words.start), list[int]()
    for number, (fact, name) in enumerate(known, 1):
        starts.append(len(ids))
        ids += words(f"{fact} {name}.")
        while len(more := words(_sentence(draw))) + len(ids) <= len(words.start) + number * room / len(known):
            ids += more
    shares = [start / len(ids) for start in starts]
    pairs = [(_nearest(depths, share), number) for number, share in enumerate(shares)]
    # Where depths are closer than facts, one fact answers for several.
    missed = [place for place in range(len(depths)) if place not in {pair[0] for pair in pairs}]
    pairs += [(place, _nearest(shares, depths[place])) for place in missed]
    return _Asked(
        torch.tensor(ids),
        [place for place, _ in pairs],
        [words(known[number][0]) for _, number in pairs],
        [words(known[number][1]) for _, number in pairs],
    )


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))


def _answers(model: nn.Module, asked: _Asked) -> Iterator[tuple[bool, float]]:
    """Of each question: whether every token of its answer is the likeliest, and their mean log-likelihood."""
    rows = [[*question, *answer] for question, answer in zip(asked.questions, asked.answers, strict=True)]
    width = max(map(len, rows))
    # What stands to the right of an answer changes nothing about it.
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
    logits = _continued(model, asked.context[None], ids)
    if bool(logits.isnan().any()):
        raise InputError(f"the logits of {type(model).__name__} are NaN: its weights are broken")
    for row, question, answer in zip(logits, asked.questions, asked.answers, strict=True):
        scores = row[len(question) - 1 : len(question) + len(answer) - 1].float().log_softmax(-1)
        wanted = torch.tensor(answer)
        likelihood = scores.gather(1, wanted[:, None]).mean()
        yield bool((scores.argmax(-1) == wanted).all()), float(likelihood)


def _continued(model: Any, context: Tensor, ids: Tensor) -> Tensor:
    """Logits `[B, n, vocabulary]` of ids int64 `[B, n]`, each row after the same context int64 `[1, T]`."""
    device = device_of(model)
    context, parts = context.to(device), ids.to(device).split(_AT_ONCE)
    inputs: dict[str, Any] = {"input_ids": context}
    cache = None
    if "use_cache" in without_cache(model, {}):
        inputs["use_cache"] = True
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        cache = getattr(model(**inputs), "past_key_values", None)
    found = []
    for part in parts:
        if cache is not None and hasattr(cache, "batch_repeat_interleave"):
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(part))
            found.append(model(input_ids=part, past_key_values=own, use_cache=True).logits.cpu())
            continue
        whole = torch.cat([context.expand(len(part), -1), part], 1)
        logits = model(**without_cache(model, {"input_ids": whole})).logits
        found.append(logits[:, context.shape[1] :].cpu())
    return torch.cat(found)
