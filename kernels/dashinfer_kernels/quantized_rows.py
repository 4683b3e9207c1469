"""Activations in 8 bits, as layers hand them to one another. Knows nothing of who makes or reads them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """`row[i] = values[row, i] * scales[row]`.

    Attributes:
        values: [rows, columns] int8 or float8_e4m3fn, contiguous.
        scales: [rows] float32, above zero.
    """

    values: Tensor
    scales: Tensor
