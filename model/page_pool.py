"""Which page of a pool holds which logical page of which sequence; on the host, no device memory.

A page is held by as many sequences as share it, and is free again when the last of them lets go.
Only whole pages are shared: nobody writes to a page that another sequence reads.
"""

from __future__ import annotations

import torch

__all__ = ["PagePool"]


class PagePool:
    """`table[row, i]`: the page of logical page i of sequence `row`, -1 outside its live range."""

    def __init__(self, name: str, num_pages: int, page_size: int) -> None:
        self.name, self.num_pages, self.page_size = name, num_pages, page_size
        self.reset(0)

    def reset(self, batch: int) -> None:
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.holders = [0] * self.num_pages
        self.table = torch.full((batch, 16), -1, dtype=torch.int32)
        self.live = [(0, 0)] * batch  # logical pages [first, end) a sequence holds

    def missing(self, row: int, length: int) -> int:
        """Pages that `row` lacks to hold `length` tokens."""
        return -(-length // self.page_size) - self.live[row][1]

    def grow(self, row: int, length: int) -> None:
        first, end = self.live[row]
        count = self.missing(row, length)
        if count <= 0:
            return
        pages = self.free[-count:][::-1]
        del self.free[-count:]
        self._put(row, end, pages)
        self.live[row] = (first, end + count)

    def share(self, source: int, row: int, first: int, end: int) -> None:
        """Let the empty `row` hold logical pages [first, end) of `source` too, and go on at end."""
        self._put(row, first, self.table[source, first:end].tolist())
        self.live[row] = (first, end)

    def drop_before(self, row: int, token: int) -> None:
        """Let go of the pages of `row` whose last token comes before `token`."""
        first, end = self.live[row]
        keep = min(end, token // self.page_size)
        if keep > first:
            for page in self.table[row, first:keep].tolist():
                self.holders[page] -= 1
                if not self.holders[page]:
                    self.free.append(page)
            self.table[row, first:keep] = -1
            self.live[row] = (keep, end)

    def release(self, row: int) -> None:
        self.drop_before(row, self.live[row][1] * self.page_size)
        self.live[row] = (0, 0)

    def slots(self, row_of_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slot of each token, (T,) int64."""
        pages = self.table[row_of_token, positions // self.page_size].long()
        return pages * self.page_size + positions % self.page_size

    def _put(self, row: int, first: int, pages: list[int]) -> None:
        end = first + len(pages)
        if end > self.table.shape[1]:
            wider = torch.full((self.table.shape[0], 2 * end), -1, dtype=torch.int32)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        self.table[row, first:end] = torch.tensor(pages, dtype=torch.int32)
        for page in pages:
            self.holders[page] += 1
