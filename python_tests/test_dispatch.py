"""Eager calls of the list ops skip PyTorch's dispatcher, unless somebody watches."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fogzo_kernels as fk


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


def test_eager_calls_count_as_changes():
    """What autograd saved and an op then overwrote is an error in the backward pass, not a wrong gradient."""
    out, latent = torch.ones(4, requires_grad=True), torch.randn(4)
    squared = out * out.detach()
    before = out._version
    with torch.no_grad():
        fk.quantize_(out, latent, torch.tensor(0.5), grid=fk.Grid.uniform(2))
    assert out._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_a_dispatch_mode_and_a_profiler_see_the_op():
    out, latent, alpha = torch.empty(4), torch.randn(4), torch.tensor(0.5)
    with Seen() as seen:
        fk.quantize_(out, latent, alpha, grid=fk.Grid.uniform(2))
    assert "fogzo.quantize_.default" in seen.names
    with torch.profiler.profile() as found:
        fk.quantize_(out, latent, alpha, grid=fk.Grid.uniform(2))
    assert "fogzo::quantize_" in {event.name for event in found.events()}


def test_a_subclass_reaches_the_dispatcher():
    with FakeTensorMode():
        fake = torch.empty(4), torch.empty(4), torch.empty(())
    fk.quantize_(*fake, grid=fk.Grid.uniform(2))  # no memory to read: only the op's fake can take it
