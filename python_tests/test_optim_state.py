"""State that appears while an optimizer runs: a momentum that was 0 at first."""

import pytest
import torch

import fogzo_kernels as fk


def run(kind, start, grads, **options):
    """Parameters after a step without momentum and the rest with 0.9; the optimizer."""
    parameters = [t.clone().requires_grad_() for t in start]
    optimizer = kind(parameters, lr=0.1, **options)
    for i, of_step in enumerate(grads):
        for p, g in zip(parameters, of_step, strict=True):
            p.grad = g.clone()
        optimizer.param_groups[0]["momentum"] = 0.9 if i else 0.0
        optimizer.step()
    return parameters


def test_momentum_raised_from_0_starts_as_in_torch(generator):
    start = [torch.randn(s, generator=generator) for s in ((5, 3), (7,))]
    grads = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(4)]
    ours, theirs = (run(kind, start, grads) for kind in (fk.SGD, torch.optim.SGD))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-6, atol=5e-6)


def test_with_dampening_it_is_refused_before_anything_is_written(generator):
    """PyTorch's buffer starts undampened whenever that is; the fused tail's only at the first step."""
    p = torch.randn(6, generator=generator).requires_grad_()
    p.grad = torch.randn(6, generator=generator)
    optimizer = fk.SGD([p], lr=0.1, dampening=0.5)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        with pytest.raises(ValueError, match="momentum must not be raised from 0 where dampening is not 0"):
            optimizer.step()
        assert torch.equal(p, before)
        optimizer.state[p]["momentum_buffer"] = None  # the same as none at all
