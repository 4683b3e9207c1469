"""The head's logits near the top: what a 16-bit product rounds away comes back."""

import pytest
import torch

from dashinfer.models.parallel import Group, VocabParallelHead
from dashinfer_kernels import pack_linear, pack_quantized, quantize_int

VOCAB_SIZE, HIDDEN = 512, 64


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


def nearly_tied(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and hidden states [32, hidden] whose two best logits are closer than bfloat16 can tell."""
    weight = weight.clone()
    weight[7] = weight[3] + torch.where(torch.arange(HIDDEN) == 1, 0.0078125, 0.0).bfloat16()
    hidden = weight[3].float() * 0.5 + 0.01 * torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(1))
    return weight, hidden.bfloat16()


def test_near_ties_come_out_in_the_right_order(weight):
    weight, hidden = nearly_tied(weight)
    expected = (hidden.float() @ weight.float().T).argmax(-1)
    rounded = VocabParallelHead(pack_linear(weight), VOCAB_SIZE, Group())(hidden).argmax(-1)
    exact = VocabParallelHead(pack_linear(weight), VOCAB_SIZE, Group(), exact=weight)(hidden).argmax(-1)

    assert (rounded != expected).any(), "the case is meant to be one that rounding gets wrong"
    assert torch.equal(exact, expected)


def test_the_other_logits_are_left_alone(weight):
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    rounded = VocabParallelHead(pack_linear(weight), VOCAB_SIZE, Group())(hidden)
    exact = VocabParallelHead(pack_linear(weight), VOCAB_SIZE, Group(), exact=weight)(hidden)

    changed = rounded != exact
    assert changed.sum() < 40
    torch.testing.assert_close(exact, hidden.float() @ weight.float().T, rtol=2**-7, atol=2**-7)


def test_logits_that_are_not_finite_stay_so(weight):
    hidden = torch.full((2, HIDDEN), torch.nan).bfloat16()

    assert VocabParallelHead(pack_linear(weight), VOCAB_SIZE, Group(), exact=weight)(hidden).isnan().all()


def test_a_row_where_all_tokens_are_equal():
    weight = torch.ones(8192, HIDDEN).bfloat16()
    hidden = torch.ones(3, HIDDEN).bfloat16()

    assert VocabParallelHead(pack_linear(weight), 8192, Group(), exact=weight)(hidden).eq(HIDDEN).all()


def test_float32_needs_no_help(weight):
    assert VocabParallelHead(pack_linear(weight.float()), VOCAB_SIZE, Group(), exact=weight.float()).exact is None


def test_weights_of_8_bits_are_made_good_near_the_top(weight):
    weight, hidden = nearly_tied(weight)
    linear = pack_quantized(quantize_int(weight, bits=8, symmetric=True), dtype=torch.bfloat16)
    truth = hidden.float() @ weight.float().T
    rounded = VocabParallelHead(linear, VOCAB_SIZE, Group())(hidden)
    exact = VocabParallelHead(linear, VOCAB_SIZE, Group(), exact=weight, share=2**-4)(hidden)

    assert (rounded.argmax(-1) != truth.argmax(-1)).any(), "the case is meant to be one that rounding gets wrong"
    assert torch.equal(exact.argmax(-1), truth.argmax(-1))
