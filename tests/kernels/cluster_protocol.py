"""The barriers of the merge in clusters (kernels/hopper/merge_common.cu) under schedules that a GPU
may choose: every role of every block as a generator that yields where it waits.

A barrier is one of the hardware's: it tells a phase from the next one, not from the one after that.
Names are those of the kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ARRIVALS, FROM_SUM, FROM_APPLY = 24, 8, 16
SUM_WARPS = 2
Wait = "tuple[Barrier, int] | None"


class Broken(AssertionError):
    """A role saw what it must not see, or nobody can go on."""


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, n: int = 1, expects: int = 0) -> None:
        self.bytes += expects
        self.pending -= n
        if self.pending < 0:
            raise Broken("more arrivals than a phase has")
        self._turn()

    def complete(self) -> None:
        self.bytes -= 1
        self._turn()

    def _turn(self) -> None:
        if self.pending == self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def over(self, parity: int) -> bool:
        return self.phase % 2 != parity


@dataclass(frozen=True)
class Cut:
    """As in the kernels; `backward` adds the roles and slots of that direction.

    `in_order`: those who apply wait for every slot, not for theirs alone, as a version that hung.
    """

    slots: int
    rows: int
    appliers: int
    backward: bool = False
    f_slots: int = 2
    in_order: bool = False
    blocks: int = 2

    @property
    def turns(self) -> int:
        return 1 if self.backward else self.appliers // self.rows


@dataclass(frozen=True)
class Unit:
    n: int
    slots: int
    passed: int
    fill: int


class Block:
    """The shared memory of a block: what each slot holds, and the barriers."""

    def __init__(self, cut: Cut) -> None:
        self.full = [Barrier(1) for _ in range(cut.slots)]
        self.empty = [Barrier(ARRIVALS) for _ in range(cut.slots)]
        self.dotted = [Barrier(cut.rows) for _ in range(cut.slots)]
        self.f_full = [Barrier(1) for _ in range(cut.f_slots)]
        self.f_empty = [Barrier(SUM_WARPS) for _ in range(cut.f_slots)]
        self.sums, self.shift, self.taken = Barrier(1), Barrier(1), Barrier(cut.appliers)
        self.held: list[int | None] = [None] * cut.slots
        self.f_held: list[int | None] = [None] * cut.f_slots
        self.sums_of: dict[tuple[int, int], int] = {}
        self.shift_of: dict[int, int] = {}


class Cluster:
    """One run: `play` ends when every role has."""

    def __init__(self, cut: Cut, rows: list[int], seed: int) -> None:
        self.cut, self.random = cut, random.Random(seed)
        self.blocks = [Block(cut) for _ in range(cut.blocks)]
        self.flying: list[Callable[[], None]] = []  # copies and messages under way
        self.units: list[Unit] = []
        fill = 0
        for n, r in enumerate(rows):
            slots = -(-r // cut.rows)
            passed = max(0, slots - cut.slots)
            self.units.append(Unit(n, slots, passed, fill))
            fill += slots + passed

    def play(self) -> None:
        roles = [role for i in range(self.cut.blocks) for role in self._roles(i)]
        speed = {id(r): self.random.choice((0.02, 0.3, 1, 1, 5)) for r in roles}
        network = self.random.choice((0.05, 0.5, 3, 20))
        waits: dict[int, Wait] = {id(r): None for r in roles}
        while roles:
            ready = [r for r in roles if (w := waits[id(r)]) is None or w[0].over(w[1])]
            if not ready and not self.flying:
                raise Broken("nobody can go on")
            work = sum(speed[id(r)] for r in ready)
            arrives = network if self.flying else 0
            if not ready or self.random.random() * (work + arrives) < arrives:
                self.flying.pop(self.random.randrange(len(self.flying)))()
                continue
            role = self.random.choices(ready, [speed[id(r)] for r in ready])[0]
            try:
                waits[id(role)] = next(role)
            except StopIteration:
                roles.remove(role)

    def _roles(self, i: int) -> list[Iterator[Wait]]:
        block, cut = self.blocks[i], self.cut
        roles = [self._load(block), self._mean(block, i)]
        roles += [self._sum(block, i, w) for w in range(SUM_WARPS)]
        roles += [self._apply(block, w) for w in range(cut.appliers)]
        return roles + ([self._dot(block) for _ in range(cut.rows)] if cut.backward else [])

    def _slot(self, fill: int) -> tuple[int, int]:
        return fill % self.cut.slots, fill // self.cut.slots % 2

    def _load(self, block: Block) -> Iterator[Wait]:
        f_fill = 0
        for u in self.units:
            for j in range(u.slots + u.passed):
                fill = u.fill + j
                slot, phase = self._slot(fill)
                if fill >= self.cut.slots:
                    yield block.empty[slot], 1 - phase
                block.held[slot] = None
                block.full[slot].arrive(expects=1)
                self.flying.append(_lands(block.held, slot, fill, block.full[slot]))
                if self.cut.backward and j < u.slots:
                    i, phase = f_fill % self.cut.f_slots, f_fill // self.cut.f_slots % 2
                    if f_fill >= self.cut.f_slots:
                        yield block.f_empty[i], 1 - phase
                    block.f_held[i] = None
                    block.f_full[i].arrive(expects=1)
                    self.flying.append(_lands(block.f_held, i, fill, block.f_full[i]))
                    f_fill += 1
                yield None

    def _sum(self, block: Block, i: int, warp: int) -> Iterator[Wait]:
        f_fill = 0
        for u in self.units:
            for j in range(u.slots):
                slot, phase = self._slot(u.fill + j)
                yield block.full[slot], phase
                if self.cut.backward:
                    yield block.dotted[slot], phase
                    f_slot = f_fill % self.cut.f_slots
                    yield block.f_full[f_slot], f_fill // self.cut.f_slots % 2
                    _expect(block.f_held[f_slot], u.fill + j)
                yield None  # while it reads
                _expect(block.held[slot], u.fill + j)
                block.empty[slot].arrive((ARRIVALS if j < u.passed else FROM_SUM) // SUM_WARPS)
                if self.cut.backward:
                    block.f_empty[f_slot].arrive()
                    f_fill += 1
            if u.n:
                yield block.taken, (u.n - 1) % 2
            for other in self.blocks:
                self.flying.append(_lands(other.sums_of, (i, warp), u.n, other.sums))
            for j in range(u.slots, u.slots + u.passed):
                slot, phase = self._slot(u.fill + j)
                yield block.full[slot], phase
                block.empty[slot].arrive(FROM_SUM // SUM_WARPS)

    def _dot(self, block: Block) -> Iterator[Wait]:
        for u in self.units:
            for j in range(u.slots + u.passed):
                slot, phase = self._slot(u.fill + j)
                yield block.full[slot], phase
                yield None
                _expect(block.held[slot], u.fill + j)
                block.dotted[slot].arrive()

    def _mean(self, block: Block, i: int) -> Iterator[Wait]:
        for u in self.units:
            if u.n:
                yield block.shift, (u.n - 1) % 2
            block.sums.arrive(expects=len(self.blocks) * SUM_WARPS)
            block.shift.arrive(expects=len(self.blocks))
            yield block.sums, u.n % 2
            yield None
            for n in block.sums_of.values():
                _expect(n, u.n)
            for other in self.blocks:
                self.flying.append(_lands(other.shift_of, i, u.n, other.shift))

    def _take(self, block: Block, u: Unit) -> Iterator[Wait]:
        yield block.shift, u.n % 2
        yield None
        for n in block.shift_of.values():
            _expect(n, u.n)
        block.taken.arrive()

    def _apply(self, block: Block, warp: int) -> Iterator[Wait]:
        cut = self.cut
        for u in self.units:
            yield from self._take(block, u)
            for j in range(u.passed, u.slots + u.passed):
                slot, phase = self._slot(u.fill + j)
                others = slot % cut.turns != warp // cut.rows and not cut.backward
                if cut.in_order or not others:
                    yield block.full[slot], phase
                if others:
                    continue
                if cut.backward:
                    yield block.dotted[slot], phase
                yield None
                _expect(block.held[slot], u.fill + j)
                parts = cut.appliers if cut.backward else cut.rows
                block.empty[slot].arrive(FROM_APPLY // parts)


def _lands(place, at, what, barrier: Barrier) -> Callable[[], None]:
    def land() -> None:
        place[at] = what
        barrier.complete()

    return land


def _expect(found: int | None, wanted: int) -> None:
    if found != wanted:
        raise Broken(f"{found} where {wanted} was waited for")
