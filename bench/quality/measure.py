"""How far one model's next-token distributions are from another's, over a text."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # [length] tokens -> [length, vocabulary] float32


@dataclass
class Tally:
    """Sums over the tokens of a text, the first of each window left out."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreements: int = 0

    def add(self, logits: Tensor, truth: Tensor, targets: Tensor) -> None:
        """Count the predictions of a window.

        Args:
            logits: [length, vocabulary] float32.
            truth: log-probabilities of the model that counts as right, the same shape.
            targets: [length] int64, the tokens that came.
        """
        predicted = torch.log_softmax(logits, -1)
        self.tokens += len(targets)
        self.loss -= predicted.gather(1, targets.unsqueeze(1)).double().sum().item()
        self.divergence += (truth.exp() * (truth - predicted)).sum(-1).double().sum().item()
        self.agreements += int((predicted.argmax(-1) == truth.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """`exp` of the mean loss in nats."""
        return math.exp(self.loss / self.tokens)

    @property
    def mean_divergence(self) -> float:
        """Kullback-Leibler, from the truth to the model, in nats a token."""
        return self.divergence / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens whose likeliest next one is the truth's."""
        return self.agreements / self.tokens


def compare(
    baseline: Logits, others: Sequence[Logits], rows: Iterable[Tensor], *, on_window: Callable[[int], None]
) -> list[Tally]:
    """Tallies of the baseline, beside itself, and of each of the others beside it.

    Args:
        rows: windows of the text, [length] int64 each.
        on_window: gets how many windows are done.
    """
    tallies = [Tally() for _ in range(1 + len(others))]
    for done, window in enumerate(rows, 1):
        first = baseline(window)[:-1]
        truth, targets = torch.log_softmax(first, -1), window[1:].to(first.device)
        tallies[0].add(first, truth, targets)
        for tally, other in zip(tallies[1:], others, strict=True):
            tally.add(other(window)[:-1], truth, targets)
        on_window(done)
    return tallies
