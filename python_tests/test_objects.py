"""Bad arguments of the objects: an error that names them, and the model stays as it was."""

import math
import re

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

NAN, INF = math.nan, math.inf
FLOATS = "float32 or bfloat16 or float16"


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: fk.Grid.uniform(1), ValueError, "bits must be in 2..8, got 1"),
        (lambda: fk.Grid.half_offset(9), ValueError, "bits must be in 1..8, got 9"),
        (lambda: fk.Grid.half_offset(2.0), TypeError, "bits must be an int, got float"),
        (lambda: fk.Grid.uniform(True), TypeError, "bits must be an int, got bool"),
        (lambda: fk.Grid(-1, 128, 0.0, 1), ValueError, "qmin and qmax must satisfy -128 <= qmin"),
        (lambda: fk.Grid(-1.5, 1, 0.0, 1), TypeError, "qmin"),
        (lambda: fk.Grid(-1, 1, 0.25, 1), ValueError, "offset must be 0 or 0.5, got 0.25"),
        (lambda: fk.Grid(-1, 1, 0.0, 3), ValueError, "r must be 1 or 2, got 3"),
        (lambda: fk.StraightThrough("relu"), ValueError, "kind must be one of identity, hardtanh,"),
        (lambda: fk.StraightThrough(clip=1), TypeError, "clip must be a bool or 'trust', got int"),
        (lambda: fk.StraightThrough(clip=None), TypeError, "clip must be a bool or 'trust', got NoneType"),
        (
            lambda: fk.StraightThrough(clip="quest"),
            ValueError,
            "clip must be True, False or 'trust', got 'quest'",
        ),
        (
            lambda: fk.StraightThrough("tanh", clip="trust"),
            ValueError,
            "clip must be True or False for 'tanh', got 'trust'",
        ),
        (
            lambda: fk.StraightThrough.of_variant("trust"),
            ValueError,
            "straight_through must be one of identity_clipped, identity_trust, identity, hardtanh, tanh,",
        ),
        (
            lambda: fk.StraightThrough(noise="x"),
            ValueError,
            "noise must be None or one of uniform,",
        ),
    ],
)
def test_a_bad_argument_of_an_object_is_named(make, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        make()


def convert(model, grid=None, alpha=0.5, straight_through=None, **options):
    parts = grid or fk.Grid.uniform(2), fk.Scale.fixed(alpha), straight_through or fk.StraightThrough()
    fk.quantize_model(model, fk.Quantizer(*parts), **options)
    return model


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))


def second_is_wrong(weight):
    return torch.ones(4, 1) if weight.shape == (4, 8) else torch.ones(3)


@pytest.mark.parametrize(
    ("make", "options", "exception", "message"),
    [
        (network, {"skip": ["head"]}, ValueError,
         "skip[0] must match a module of model that holds weights, or such a weight, got 'head'"),
        (network, {"skip": ["0", "1"]}, ValueError,
         "skip[1] must match a module of model that holds weights, or such a weight, got '1'"),
        (network, {"skip": ["*"]}, ValueError,
         "model must have a module to quantize, got none (0: skip[0], '*'; 2: skip[0], '*')"),
        (nn.ReLU, {}, ValueError, "model must have a module to quantize, got none (it holds no weights)"),
        (lambda: nn.BatchNorm1d(4), {}, ValueError,
         "model must have a module to quantize, got none (model: BatchNorm1d has no quantized form)"),
        (lambda: network().double(), {}, TypeError, f"0.weight must be {FLOATS}, got float64"),
        (network, {"alpha": torch.ones(3)}, ValueError,
         "for 0.weight with 4 rows of 8, got shape (3,)"),
        (network, {"alpha": torch.ones(1, 8)}, ValueError, "with 4 rows of 8, got shape (1, 8)"),
        (network, {"alpha": torch.ones(16)}, ValueError, "with 4 rows of 8, got shape (16,)"),
        (network, {"alpha": second_is_wrong}, ValueError,
         "for 2.weight with 4 rows of 4, got shape (3,)"),
        *((network, {"alpha": x}, ValueError, "alpha must be finite")
          for x in (0.0, -1.0, NAN, INF, 2.0**101)),
        (network, {"alpha": "half"}, TypeError, "alpha must be"),
        *((network, {"alpha": alpha}, TypeError, f"alpha must be {expected}, got a tensor of {dtype}")
          for dtype in ("bool", "uint8", "int64", "complex64")
          for alpha, expected in (
              (torch.ones((), dtype=getattr(torch, dtype)),
               "a number, a floating tensor or a function of a weight that returns one"),
              (lambda weight, dtype=dtype: torch.ones((), dtype=getattr(torch, dtype)),
               "a function of a weight that returns a number or a floating tensor"))),
        (network, {"grid": "sign"}, TypeError, "grid must be"),
        (network, {"straight_through": fk.StraightThrough("tanh")}, ValueError,
         "straight_through must be 'identity' for rounding grids"),
    ],
)  # fmt: skip
def test_a_bad_call_of_quantize_model_is_named_and_changes_nothing(make, options, exception, message):
    model = make()
    before = [(type(m), list(m.state_dict()), dict(vars(m))) for m in model.modules()]
    with pytest.raises(exception, match=re.escape(message)):
        convert(model, **options)
    assert before == [(type(m), list(m.state_dict()), dict(vars(m))) for m in model.modules()]


def quantized(**options):
    return convert(network(), **options)


def one_tensor_id():
    model = quantized()
    model[2].tensor_id = model[0].tensor_id
    return model


def two_epsilons():
    sign = {"grid": fk.Grid.sign(), "straight_through": fk.StraightThrough("tanh")}
    return convert(quantized(skip=["2"]), **sign)


@pytest.mark.parametrize(
    ("make", "options", "exception", "message"),
    [
        *((make, {}, ValueError, "model must have trainable quantized weights")
          for make in (network, lambda: quantized().requires_grad_(False))),
        (one_tensor_id, {}, ValueError, "model must have a tensor_id of its own for each weight"),
        (two_epsilons, {}, ValueError, "model must have one eps in units of delta"),
        (quantized, {"one_minus_beta": 0.5}, ValueError, "one_minus_beta and kappa must not both be given"),
        *((quantized, {"kappa": x}, ValueError, "kappa must be in 0..48, the number of w")
          for x in (-1, 49, NAN)),
        *((quantized, {"kappa": None, "one_minus_beta": x}, ValueError,
           f"one_minus_beta must be in 0..1, got {x}") for x in (-0.1, 1.1, NAN)),
        *((quantized, {"total_steps": x}, ValueError, f"total_steps must be an int >= 1, got {x}")
          for x in (0, -1, 1.5, True)),
        *((quantized, {"directions": x}, ValueError, "directions must be")
          for x in (-1, 2**16 + 1)),
        (quantized, {"noise_per": "x"}, ValueError, "noise_per must be one of model, tensor, got 'x'"),
        (quantized, {"directions": 1.0}, TypeError, "directions must be an int, got float"),
        *((quantized, {"seed": x}, ValueError, "seed must be in 0..1844") for x in (-1, 2**64)),
        (quantized, {"seed": "1"}, TypeError, "seed must be an int, got str"),
        *((quantized, {"start": x}, ValueError, f"start must be in 0..1, got {x}")
          for x in (-0.5, 2, NAN)),
        *((quantized, {"epsilon_scale": x}, ValueError, "epsilon_scale must be finite and >= 0")
          for x in (-1.0, NAN, INF)),
        (quantized, {"loss_reduction": "max"}, ValueError, "loss_reduction must be 'mean', 'sum' or None"),
        *((quantized, {name: "x"}, TypeError, f"{name} must be")
          for name in ("kappa", "start", "epsilon_scale")),
    ],
)  # fmt: skip
def test_a_bad_argument_of_fogzo_is_named_and_changes_nothing(make, options, exception, message):
    model = make()
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(exception, match=re.escape(message)):
        fk.Fogzo(model, **({"directions": 1, "total_steps": 10, "kappa": 1.0} | options))
    assert before == [dict(vars(m)) for m in model.modules()]
