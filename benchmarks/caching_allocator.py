"""PyTorch's caching allocator for CUDA, simulated: what it reserves for the allocations of a program, in their order.

Written from the rules of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.11 to 2.13), without their code:

- A size is rounded up to 512 bytes. Up to 1 MiB it comes from the small pool, in segments of 2 MiB. More comes from the
  large pool: below 10 MiB in segments of 20 MiB, else in one of its own size, rounded up to 2 MiB.
- The smallest free block that holds it is taken, of equal ones that with the lowest address. What is over is split off,
  where that is at least 512 bytes (small pool) or more than 1 MiB (large pool). Free neighbours join again.
- Each stream has its own blocks.
- Where the card has no more, all segments that are wholly free are given back, and it is tried once more.
- `expandable`: a pool is one segment for each stream, of pages of 2 MiB (small) or 20 MiB (large), that grows where no
  free block is large enough; any rest is split off. A free block that the segment could grow behind is taken after a
  larger one that it could not. Where the card has no more, pages that are wholly free are given back.

Not simulated: graphs' private pools, blocks that another stream still uses, options of the allocator.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

BLOCK, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT, ROUNDED = 512, 2**20, 2 * 2**20, 20 * 2**20, 10 * 2**20, 2**21
APART = 2**50
"""Between addresses of segments, which lie in the order in which they were made."""
CARD = 80 * 2**30


class OutOfMemory(Exception):
    pass


class Block:
    __slots__ = ("address", "after", "before", "expandable", "free", "mapped", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, expandable: bool = False, mapped: bool = True):
        self.pool, self.address, self.size = pool, address, size
        self.expandable, self.mapped, self.free = expandable, mapped, True
        self.before: Block | None = None
        self.after: Block | None = None


class Pool:
    """Small or large, of one stream."""

    def __init__(self, small: bool):
        self.small = small
        self.free: list[tuple[int, int]] = []
        """(size, address), sorted."""
        self.unmapped: list[int] = []
        """Addresses, sorted."""
        self.at: dict[int, Block] = {}
        """Blocks of both lists, by address."""

    def add(self, block: Block) -> None:
        self.at[block.address] = block
        if block.mapped:
            insort(self.free, (block.size, block.address))
        else:
            insort(self.unmapped, block.address)

    def remove(self, block: Block) -> None:
        listed, entry = (self.free, (block.size, block.address)) if block.mapped else (self.unmapped, block.address)
        place = bisect_left(listed, entry)
        assert listed[place] == entry
        del listed[place], self.at[block.address]


class Allocator:
    def __init__(self, expandable: bool = False, capacity: int | None = None):
        """capacity: bytes that the card has for segments; None: as many as are asked for."""
        self.expandable, self.capacity = expandable, capacity
        self.pools: dict[tuple[bool, int], Pool] = {}
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.segments = self.retries = 0

    def malloc(self, size: int, stream: int = 0) -> Block:
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL
        pool = self.pools.setdefault((small, stream), Pool(small))
        block = self._free_block(pool, size) or self._new_block(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._new_block(pool, size)
        if block is None:
            raise OutOfMemory(f"{size} bytes, {self.reserved} reserved of which {self.allocated} allocated")
        block.free, over = False, block.size - size
        if over >= BLOCK if small or self.expandable else over > SMALL:
            rest = Block(pool, block.address + size, over, block.expandable)
            _join(rest, block.after)
            _join(block, rest)
            block.size = size
            pool.add(rest)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        self._merge(block)
        block.free = True
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Give back what is wholly free: segments, or pages of expandable ones."""
        for pool in sorted(self.pools.values(), key=lambda pool: pool.small):
            for block in [pool.at[address] for _, address in pool.free]:
                if block.expandable:
                    self._unmap(block)
                elif block.before is block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    # ------------------------------------------------------------ finding a block

    def _free_block(self, pool: Pool, size: int) -> Block | None:
        place = bisect_left(pool.free, (size, -1))
        if place == len(pool.free):
            return None
        block = pool.at[pool.free[place][1]]
        while block.expandable and place + 1 < len(pool.free):
            other = pool.at[pool.free[place + 1][1]]
            if _reach(other) >= _reach(block):
                break
            block, place = other, place + 1
        pool.remove(block)
        return block

    def _new_block(self, pool: Pool, size: int) -> Block | None:
        if self.expandable:
            return self._grown(pool, size)
        if size <= SMALL:
            size = SMALL_SEGMENT
        else:
            size = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // ROUNDED) * ROUNDED
        return self._segment(pool, size) if self._reserve(size) else None

    def _segment(self, pool: Pool, size: int, expandable: bool = False) -> Block:
        self.segments += 1
        return Block(pool, self.segments * APART, size, expandable, mapped=not expandable)

    def _reserve(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        return True

    # ------------------------------------------------------------ expandable segments

    def _grown(self, pool: Pool, size: int) -> Block | None:
        block = self._expandable(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            after = block.after
            if not self._map(after, min(size - block.size, after.size)):
                return None
            block = after
        pool.remove(block)
        return block

    def _expandable(self, pool: Pool, size: int) -> Block:
        """The first of free and unmapped blocks in a row that together are large enough."""
        for address in pool.unmapped:
            block = pool.at[address]
            if block.before is not None and block.before.free:
                block = block.before
            room, each = 0, block
            while room < size and each is not None and each.free:
                room, each = room + each.size, each.after
            if room >= size:
                return block
        page = _page(pool)
        whole = self._segment(pool, -(-(CARD + CARD // 8) // page) * page, expandable=True)
        pool.add(whole)
        return whole

    def _map(self, block: Block, size: int) -> bool:
        pool, page = block.pool, _page(block.pool)
        size = -(-size // page) * page
        if not self._reserve(size):
            return False
        pool.remove(block)
        if block.size > size:
            rest = Block(pool, block.address + size, block.size - size, True, mapped=False)
            _join(rest, block.after)
            _join(block, rest)
            pool.add(rest)
            block.size = size
        block.mapped = True
        self._merge(block)
        pool.add(block)
        return True

    def _unmap(self, block: Block) -> None:
        pool, page = block.pool, _page(block.pool)
        begin = -(-(block.address % APART) // page) * page + block.address // APART * APART
        end = (block.address + block.size) % APART // page * page + block.address // APART * APART
        if begin >= end:
            return
        pool.remove(block)
        for address, size in ((block.address, begin - block.address), (end, block.address + block.size - end)):
            if size:
                kept = Block(pool, address, size, True)
                if address < begin:
                    _join(block.before, kept)
                    _join(kept, block)
                else:
                    _join(kept, block.after)
                    _join(block, kept)
                pool.add(kept)
        self.reserved -= end - begin
        block.address, block.size, block.mapped = begin, end - begin, False
        self._merge(block)
        pool.add(block)

    def _merge(self, block: Block) -> None:
        """With free neighbours that are as mapped as it is."""
        for other in (block.before, block.after):
            if other is None or not other.free or other.mapped != block.mapped:
                continue
            block.pool.remove(other)
            if other is block.before:
                block.address = other.address
                _join(other.before, block)
            else:
                _join(block, other.after)
            block.size += other.size


def _page(pool: Pool) -> int:
    return SMALL_SEGMENT if pool.small else LARGE_SEGMENT


def _reach(block: Block) -> int:
    """Its size with what it could grow by."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _join(before: Block | None, after: Block | None) -> None:
    if before is not None:
        before.after = after
    if after is not None:
        after.before = before


Event = tuple[int, int]
"""(a number, bytes allocated by it), or (the same number, 0): let go. (-1, 0): the cache is emptied; (-2, 0): peaks are
counted anew."""
EMPTY_CACHE, RESET_PEAKS = (-1, 0), (-2, 0)


def replay(events: Iterable[Event], expandable: bool = False, capacity: int | None = None) -> Allocator:
    allocator, held = Allocator(expandable, capacity), {}
    for event in events:
        number, size = event
        if event == EMPTY_CACHE:
            allocator.empty_cache()
        elif event == RESET_PEAKS:
            allocator.peak_allocated, allocator.peak_reserved = allocator.allocated, allocator.reserved
        elif size:
            held[number] = allocator.malloc(size)
        else:
            allocator.free(held.pop(number))
    return allocator
