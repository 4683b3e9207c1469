"""Which part of a model's layers a rank holds when they are split over the stages of a pipeline. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`. The first has the embedding, the last the final norm and the head."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Its layers, of `num_layers`: as many as any other's, or one more in stages before the last, which has the head."""
        start, stop = (-(-each * num_layers // self.count) for each in (self.index, self.index + 1))
        return range(start, stop)
