"""The Hadamard matrix in float64, against which the transform is tested."""

import math

import torch


def matrix(block):
    """Sylvester's, orthonormal, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(block)
