"""Definition of bidirectional attention within sequences: one dense score matrix a sequence, in at least float32."""

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, shared = k.shape[1], num_heads // k.shape[1]
    out = torch.empty(tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        queries = q[begin:end].to(wide).view(end - begin, num_kv_heads, shared, head_dim)
        scores = torch.einsum("lhgd,thd->hglt", queries, k[begin:end].to(wide)) * scale
        attended = torch.einsum("hglt,thd->lhgd", torch.softmax(scores, -1), v[begin:end].to(wide))
        out[begin:end] = attended.reshape(end - begin, num_heads * head_dim).to(q.dtype)
    return out
