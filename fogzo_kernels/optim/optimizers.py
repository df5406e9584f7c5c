"""AdamW and SGD with the fused tail."""

from __future__ import annotations

from torch import Tensor

from ..functional import estimate_adamw_, estimate_sgd_
from ..spec.checks import hinted
from ..train.fogzo import Fogzo
from .fused import FusedOptimizer, Params

NOT_OFFERED = "it is not offered; torch.optim has it, and steps after fogzo.estimate_()"
HINTED = hinted(
    beta1="the argument is betas, a pair",
    beta2="the argument is betas, a pair",
    beta="the argument is betas, a pair; the beta of Fogzo is set there",
    alpha_lr="give it to fk.parameter_groups(model, weight_decay=..., alpha_lr=...), and its result as params",
    amsgrad=NOT_OFFERED,
    maximize=NOT_OFFERED,
)


class AdamW(FusedOptimizer):
    """``torch.optim.AdamW`` that makes FOGZO's estimate in the same pass over memory.

    Without ``fogzo``, and for parameters that are not quantized, it is AdamW up to float32 rounding (arXiv
    1711.05101; contract, section 4). Its state is float32 for any dtype of the parameters. It has no
    ``amsgrad`` and no ``maximize``, and takes no sparse gradients.

    Args:
        params: parameters, or dicts with the parameters and options of a group, as in PyTorch.
        lr: learning rate, >= 0: a number, or for CUDA graphs a 0-dim tensor on the parameters' device.
        betas: decay of the means of the gradient and of its square, each in 0..1, below 1.
        eps: number that is added to the root of the second mean, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        fogzo: the estimator of the model that has these parameters. None: plain AdamW.
        master_weights: keep and update a float32 copy of bfloat16 and float16 parameters.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: name of a backend; None takes that of ``fogzo``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(2))
        >>> fogzo = fk.Fogzo(model, total_steps=100)
        >>> optimizer = fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo)
        >>> optimizer.step(lambda: model(torch.ones(2, 8)).square().mean()).shape
        torch.Size([])
    """

    KIND = "adamw"
    OP = staticmethod(estimate_adamw_)

    @HINTED
    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, fogzo: Fogzo | None = None,
        master_weights: bool = False, capturable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        hyperparameters = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters, lr, fogzo, master_weights, capturable, backend)


class SGD(FusedOptimizer):
    """``torch.optim.SGD`` that makes FOGZO's estimate in the same pass over memory.

    Without ``fogzo``, and for parameters that are not quantized, it is SGD up to float32 rounding (contract,
    section 4). Its state is float32 for any dtype of the parameters. It has no ``maximize`` and takes no sparse
    gradients.

    Args:
        params: parameters, or dicts with the parameters and options of a group, as in PyTorch.
        lr: learning rate, >= 0: a number, or for CUDA graphs a 0-dim tensor on the parameters' device.
        momentum: factor on the momentum buffer, >= 0. Without momentum there is no state.
        dampening: share of the gradient that the buffer does not take, after the first step.
        weight_decay: weight decay that is added to the gradient, >= 0.
        nesterov: use Nesterov's form. It needs momentum > 0 and dampening 0.
        fogzo: the estimator of the model that has these parameters. None: plain SGD.
        master_weights: keep and update a float32 copy of bfloat16 and float16 parameters.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: name of a backend; None takes that of ``fogzo``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
        >>> optimizer = fk.SGD(model.parameters(), lr=0.1, momentum=0.9, fogzo=fk.Fogzo(model, total_steps=100))
        >>> optimizer.step(lambda: model(torch.ones(2, 8)).square().mean()).shape
        torch.Size([])
    """

    KIND = "sgd"
    OP = staticmethod(estimate_sgd_)

    @HINTED
    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, fogzo: Fogzo | None = None,
        master_weights: bool = False, capturable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        hyperparameters = {
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, hyperparameters, lr, fogzo, master_weights, capturable, backend)
