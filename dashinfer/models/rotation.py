"""A rotation of the residual stream after which no channel stands out, folded into a decoder's weights (arXiv 2404.00456).

Trained models have channels tens of times as large as the others. Integers that share a scale with those lose most of their
bits. An orthogonal matrix mixes the channels, and the model stays the same: embeddings and what layers add to the stream are
rotated, what layers read is rotated back in their weights, after a norm's weights, which have moved there too. No data is
needed. A Hadamard matrix spreads each channel evenly over its block.
"""

import torch
from torch import Tensor

from dashinfer_kernels import pack_linear

MAX_BLOCK = 256  # a channel may be up to 16 times as large as its neighbours then, and not stand out


class Rotation:
    """Orthogonal and symmetric, so it undoes itself: Hadamard matrices of the greatest size that divides the channels."""

    def __init__(self, channels: int, device: torch.device) -> None:
        size = min(channels & -channels, MAX_BLOCK)
        matrix = torch.ones(1, 1, device=device)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        self._matrix = matrix * size**-0.5
        self._linear = pack_linear(self._matrix)
        self.nbytes = self._matrix.nbytes + self._linear.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, channels] float32 to the same, rotated; in deterministic mode a row's bits do not depend on the others."""
        return self._linear(x.reshape(-1, len(self._matrix))).view(x.shape)

    def of_inputs(self, weight: Tensor, norm: Tensor) -> Tensor:
        """A matrix that reads the stream, [outputs, channels] float32, which is overwritten.

        Args:
            norm: [channels], the weights of the norm before it.
        """
        blocks = weight.mul_(norm).view(-1, len(self._matrix))
        return torch.mm(blocks, self._matrix).view(weight.shape)

    def of_outputs(self, weight: Tensor) -> Tensor:
        """A matrix, or its bias, that writes to the stream: [channels] or [channels, inputs] float32."""
        return torch.matmul(self._matrix, weight.view(-1, len(self._matrix), weight[0].numel())).view(weight.shape)
