"""How many feed-forward channels each layer keeps: the cheapest groups anywhere in the model go first."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 32  # channels in a group: what quantization's blocks and the kernels like widths to be a multiple of


def group_sizes(width: int) -> Iterator[int]:
    """What to remove step by step so that after each the width is a multiple of BLOCK; the last block stays."""
    if width % BLOCK and width > BLOCK:
        yield width % BLOCK
    yield from (BLOCK for _ in range(width // BLOCK - 1))


@dataclass(frozen=True)
class Removal:
    """A group of channels of one layer, and what its loss costs in nats once the groups before it are gone."""

    channels: Tensor
    cost: float


def allocate(groups: Mapping[int, Sequence[Removal]], total: int) -> dict[int, int]:
    """For each layer the number of groups to remove, about `total` channels in all.

    Costs of a layer rise from group to group (nearly), so taking the cheapest next one a channel is the best choice.
    """
    heap = [(_price(removals[0]), layer) for layer, removals in groups.items() if removals]
    heapq.heapify(heap)
    taken, left = dict.fromkeys(groups, 0), total
    while heap:
        _, layer = heapq.heappop(heap)
        removal = groups[layer][taken[layer]]
        if left < len(removal.channels) / 2:
            break
        left -= len(removal.channels)
        taken[layer] += 1
        if taken[layer] < len(groups[layer]):
            heapq.heappush(heap, (_price(groups[layer][taken[layer]]), layer))
    return taken


def _price(removal: Removal) -> float:
    return removal.cost / len(removal.channels)
