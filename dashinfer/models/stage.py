"""Which part of a model's layers a rank holds when they are split over the stages of a pipeline. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`. The first has the embedding, the last the final norm and the head.

    Attributes:
        head: what the head costs, in layers; see `dashinfer.models.shapes.head_cost`. The same on all ranks.
    """

    index: int = 0
    count: int = 1
    head: float = 0.0

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Its layers, of `num_layers`, which are at least as many as stages are."""
        counts = deal_layers(num_layers, self.count, self.head)
        start = sum(counts[: self.index])
        return range(start, start + counts[self.index])


def deal_layers(num_layers: int, count: int, head: float) -> list[int]:
    """Numbers of layers, one at least, for so many stages, so that the slowest takes as little time as it can; then so that all
    take about as much. Those before the last differ by one at most, and the larger ones come first.

    Args:
        head: what the last stage does besides, in layers.
    """
    assert 1 <= count <= num_layers
    if count == 1:
        return [num_layers]

    def deal(last: int) -> list[int]:
        each, more = divmod(num_layers - last, count - 1)
        return [*[each + 1] * more, *[each] * (count - 1 - more), last]

    def cost(counts: list[int]) -> tuple[float, float]:
        costs = [*counts[:-1], counts[-1] + head]
        return max(costs), sum(each * each for each in costs)

    return min(map(deal, range(1, num_layers - count + 2)), key=cost)
