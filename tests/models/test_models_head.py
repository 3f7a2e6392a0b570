"""Log-probs under a linear head, tile by tile: values and gradients are those of logits and a softmax."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks.tensor_memory import TensorMemory
from torch import nn

from dmpo_lightning.models.head import chunk_rows, linear_log_probs, target_log_probs

VOCAB, WIDTH, POSITIONS = 50, 12, 9


def inputs(seed=0, *, positions=POSITIONS, vocab=VOCAB, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, WIDTH, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (positions,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def naive(hidden, weight, targets, *, logit_bias=None, temperature=1.0):
    logits = F.linear(hidden, weight)
    logits = logits if logit_bias is None else logits + logit_bias
    return (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def bans(targets, vocab=VOCAB):
    ban = torch.zeros(vocab, dtype=torch.float64)
    ban[[token for token in range(0, vocab, 7) if token not in targets.tolist()]] = -torch.inf
    return ban


TILES = [(1, 1), (3, 7), (4, 50), (100, 13), (100, 100)]


@pytest.mark.parametrize("learns_head", [False, True])
@pytest.mark.parametrize("banning", [False, True])
def test_values_and_gradients_are_those_of_a_softmax(learns_head, banning):
    hidden, weight, targets = inputs()
    incoming = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64)

    def results(function, **options) -> list[torch.Tensor]:
        leaves = [each.clone().requires_grad_(learns) for each, learns in ((hidden, True), (weight, learns_head))]
        log_probs = function(*leaves, targets, logit_bias=bans(targets) if banning else None, **options)
        (log_probs * incoming).sum().backward()
        return [log_probs.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    for temperature in (1.0, 0.3):
        expected = results(naive, temperature=temperature)
        for rows, tokens in TILES:
            tile = {"chunk_bytes": 4 * tokens * rows, "chunk_tokens": tokens}
            found = results(linear_log_probs, temperature=temperature, **tile)
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other.double(), one, rtol=1e-9, atol=1e-9)


def test_gradients_pass_the_numeric_check():
    hidden, weight, targets = inputs()
    for learns in (False, True):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_(learns))
        assert torch.autograd.gradcheck(
            lambda *leaves: linear_log_probs(*leaves, targets, chunk_bytes=200, chunk_tokens=11), leaves
        )


def test_an_all_but_certain_target_keeps_its_small_gradient():
    hidden, weight, targets = torch.tensor([[40.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0])
    hidden.requires_grad_()
    log_probs = linear_log_probs(hidden, weight, targets)
    log_probs.sum().backward()
    assert log_probs.item() == pytest.approx(-4.248354255291589e-18, rel=1e-5)
    assert hidden.grad.item() == pytest.approx(4.248354255291589e-18, rel=1e-5)


def test_scores_beyond_the_range_of_exp_are_no_trouble():
    hidden, weight, targets = inputs(scale=1e3, dtype=torch.float32)
    log_probs = linear_log_probs(hidden, weight, targets, chunk_tokens=7)
    expected = naive(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-4, atol=1e-2)


def test_half_precision_scores_are_summed_in_float32():
    hidden, weight, targets = inputs(positions=64, dtype=torch.bfloat16)
    expected = naive(hidden.double(), weight.double(), targets)
    log_probs = linear_log_probs(hidden, weight, targets, chunk_tokens=16)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, rtol=0.02, atol=0.05)  # bfloat16 has 8 bits


def test_autocast_makes_the_scores_in_its_type_and_gives_gradients_in_that_of_the_input():
    hidden, weight, targets = inputs(dtype=torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = linear_log_probs(hidden, weight, targets)
    log_probs.sum().backward()
    assert (log_probs.dtype, hidden.grad.dtype) == (torch.float32, torch.float32)
    expected = naive(hidden.detach().double(), weight.double(), targets)
    torch.testing.assert_close(log_probs.detach().double(), expected, rtol=0.02, atol=0.05)


def test_no_positions_give_no_log_probs_and_zero_gradients():
    hidden, weight, targets = inputs(positions=0)
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs = linear_log_probs(hidden, weight, targets)
    assert log_probs.shape == (0,)
    log_probs.sum().backward()
    assert weight.grad.abs().sum() == 0


class Scaled(nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Biased(nn.Linear):
    """A head with a bias, whose tensor the test does not see."""

    def __init__(self, width, vocab, bias, dtype):
        super().__init__(width, vocab, bias=True, dtype=dtype)
        nn.init.zeros_(self.bias)


@pytest.mark.parametrize("head_class", [nn.Linear, Scaled, Biased])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCAB * 4, 1 << 20])
def test_any_head_gives_the_same_log_probs(head_class, hooked, chunk_bytes):
    hidden, weight, targets = inputs()
    head = head_class(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight.data = weight.clone()
    calls = []
    if hooked:
        head.register_forward_hook(lambda *_: calls.append(1))
    hidden.requires_grad_()
    shaped = hidden.view(3, 3, WIDTH)
    ban = bans(targets)
    options = {"logit_bias": ban, "temperature": 0.5, "chunk_bytes": chunk_bytes}
    log_probs = target_log_probs(head, shaped, targets.view(3, 3), **options)
    (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
    scale = 2.0 if head_class is Scaled else 1.0
    other = hidden.detach().requires_grad_()
    expected = naive(other, scale * weight, targets, logit_bias=ban, temperature=0.5)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), other)
    torch.testing.assert_close(log_probs.detach().double().flatten(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert len(calls) == hooked  # one call, whatever the number of positions


def peak(*, vocab: int, positions: int, learns_head: bool = False) -> int:
    """Bytes beside the head and the hidden states at the worst moment of forward and backward pass."""
    hidden, weight, targets = inputs(positions=positions, vocab=vocab, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(learns_head)
    memory = TensorMemory([hidden, weight, targets])
    before = memory.live
    with memory:
        linear_log_probs(hidden, weight, targets, chunk_bytes=1 << 20, chunk_tokens=1024).sum().backward()
    return memory.peak - before


def test_memory_does_not_grow_with_the_vocabulary():
    assert peak(vocab=64_000, positions=512) == peak(vocab=4_000, positions=512)


def test_memory_grows_with_positions_as_hidden_states_do_and_not_as_logits_do():
    small, large = (peak(vocab=16_000, positions=positions) for positions in (1024, 8192))
    assert large - small <= 5 * 4 * WIDTH * (8192 - 1024)
    assert large < 16_000 * 8192 * 4 / 50


def test_a_learned_head_adds_its_gradient_and_no_logits():
    small, large = (peak(vocab=vocab, positions=512, learns_head=True) for vocab in (4_000, 64_000))
    assert large - small <= 4 * WIDTH * (64_000 - 4_000)


def test_rows_of_a_chunk_fit_and_are_never_none():
    assert chunk_rows(100_000, 1 << 20, 1024) == 256
    assert chunk_rows(100, 1 << 20, 1024) == 2621
    assert chunk_rows(100_000, 1, 1024) == 1
