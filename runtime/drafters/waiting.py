"""Hidden states that a drafter was given and has not read."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Waiting:
    """Rows [n, width] in the pieces in which they came: each is copied once, when it is taken."""

    def __init__(self) -> None:
        self._pieces: deque[Floats] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Floats) -> None:
        if len(rows):
            self._pieces.append(rows)
            self._count += len(rows)

    def clear(self) -> None:
        self._pieces.clear()
        self._count = 0

    def drop(self, count: int) -> None:
        """The first `count` rows are not wanted."""
        self._count -= count
        while count and count >= len(self._pieces[0]):
            count -= len(self._pieces.popleft())
        if count:
            self._pieces[0] = self._pieces[0][count:]

    def take(self, count: int) -> Floats:
        """The first `count` rows, at least one; they wait no longer."""
        taken, missing = list[Floats](), count
        for piece in self._pieces:
            taken.append(piece[:missing])
            missing -= len(taken[-1])
            if not missing:
                break
        self.drop(count)
        return np.concatenate(taken)
