"""Bidirectional attention within sequences on CPU: `scaled_dot_product_attention` once for all sequences of one length.

Windows come by the thousand and in few lengths. Those of one length that follow each other are taken where they are; others
are gathered, which costs little beside attending to them.
"""

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float) -> Tensor:
    tokens, num_heads, head_dim = q.shape
    out = torch.empty(tokens, num_heads * head_dim, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    by_length = defaultdict(list)
    for begin, end in pairwise(bounds):
        by_length[end - begin].append(begin)
    by_length.pop(0, None)

    for length, begins in by_length.items():
        count = len(begins)
        if begins[-1] - begins[0] == (count - 1) * length:
            rows = slice(begins[0], begins[-1] + length)
        else:
            rows = (torch.tensor(begins).unsqueeze(1) + torch.arange(length)).flatten()
        out[rows] = _attend(*(x[rows].unflatten(0, (count, length)) for x in (q, k, v)), scale).flatten(0, 1)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[sequences, length, num_heads * head_dim] for sequences of one length."""
    sequences, length, num_kv_heads, head_dim = k.shape
    # Without a mask, query heads that share a KV head are merely more queries.
    rows = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(sequences, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).reshape(sequences, length, -1)
