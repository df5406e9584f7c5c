"""Functions that PyTorch compiles, in the tests."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def compiled(function):
    """The function in one graph, and what counts how often it was compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter
