"""A detector of races in Triton kernels, over its interpreter.

    with Watch() as watch:
        ...                         # kernels run, in the child process of `interpreter.interpreted`
    assert not watch.races

The interpreter runs the programs of a launch one after the other, so a result may be right by that order
alone. On a GPU they run in any order and at once. Here every program's reads and writes are kept by address;
a race is an address that one program writes and another one of the same launch reads or writes. Atomic
operations may meet each other. What the threads of one program do to each other is not seen: the compiler
puts barriers there.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Addresses = NDArray[np.uint64]


class Race(NamedTuple):
    """kernel: its name. kind: "write and write", or "write and read". places: how many addresses."""

    kernel: str
    kind: str
    places: int


class Watch:
    """Watches all launches while it is entered. kernels: the names of those that ran. accesses: of places by
    programs, each counted once in a launch."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.accesses = 0
        self.races: list[Race] = []
        self._accesses: dict[str, list[tuple[Addresses, int]]] = {}
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        from triton.runtime import interpreter

        builder: Any = interpreter.InterpreterBuilder
        executor: Any = interpreter.GridExecutor
        self._wrap(builder, "create_masked_load", "read", lambda ptrs, mask, *_: (ptrs, mask))
        self._wrap(builder, "create_masked_store", "write", lambda ptrs, value, mask, *_: (ptrs, mask))
        self._wrap(builder, "create_atomic_rmw", "atomic", lambda op, ptr, value, mask, *_: (ptr, mask))
        self._wrap(builder, "create_atomic_cas", "atomic", lambda ptr, *_: (ptr, None))
        plain = executor.__call__

        def launch(grid: Any, *arguments: Any, **named: Any) -> None:
            self._accesses = {"read": [], "write": [], "atomic": []}
            plain(grid, *arguments, **named)
            self._judge(grid.fn.__name__)

        self._replace(executor, "__call__", launch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, plain in reversed(self._undo):
            setattr(owner, name, plain)

    def _replace(self, owner: Any, name: str, by: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, by)

    def _wrap(self, builder: Any, name: str, kind: str, places: Any) -> None:
        plain = getattr(builder, name)

        def method(builder: Any, *arguments: Any, **named: Any) -> Any:
            pointers, mask = places(*arguments)
            at = np.asarray(pointers.data)
            if mask is not None:
                at = at[np.broadcast_to(np.asarray(mask.data, dtype=bool), at.shape)]
            x, y, z = builder.grid_idx
            _, height, depth = builder.grid_dim
            self._accesses[kind].append((np.unique(at), (x * height + y) * depth + z))
            return plain(builder, *arguments, **named)

        self._replace(builder, name, method)

    def _judge(self, kernel: str) -> None:
        self.kernels.add(kernel)
        writes, reads, atomics = (_by_address(self._accesses[kind]) for kind in ("write", "read", "atomic"))
        self.accesses += len(writes) + len(reads) + len(atomics)
        for kind, first, second in (
            ("write and write", writes, writes),
            ("write and read", writes, reads),
            ("write and atomic", writes, atomics),
            ("atomic and read", atomics, reads),
        ):
            places = _shared(first, second)
            if places:
                self.races.append(Race(kernel, kind, places))


def _by_address(accesses: list[tuple[Addresses, int]]) -> NDArray[np.uint64]:
    """[n, 2] of address and program, each pair once."""
    pairs = [np.stack([at, np.full_like(at, program)], 1) for at, program in accesses if at.size]
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), np.uint64)


def _shared(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    """Addresses of both that more than one program touches."""
    common = np.intersect1d(first[:, 0], second[:, 0])
    pairs = np.concatenate([x[np.isin(x[:, 0], common)] for x in (first, second)])
    _, programs = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    return int((programs > 1).sum())
