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
    """``torch.optim.AdamW`` with FOGZO's estimate in the same pass.

    Without ``fogzo``, and for parameters that are not quantized, it is AdamW up to float32 rounding
    (Loshchilov & Hutter, ICLR 2019; docs/contract.md, section 4); amsgrad, maximize and sparse
    gradients are not offered. State is float32 whatever the parameters' dtype.

    Args:
        params: parameters, or dicts of a group's parameters and options, as in PyTorch.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device (for CUDA graphs).
        betas: decay of the means of gradient and squared gradient, in 0..1, below 1.
        eps: added to the root of the second mean, >= 0.
        weight_decay: decoupled, >= 0.
        fogzo: the estimator around the model whose parameters these are.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, and update that.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: of the op; None takes that of ``fogzo``, else the best available.
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
    """``torch.optim.SGD`` with FOGZO's estimate in the same pass.

    Without ``fogzo``, and for parameters that are not quantized, it is SGD up to float32 rounding
    (docs/contract.md, section 4); maximize and sparse gradients are not offered. State is always float32.

    Args:
        params: parameters, or dicts of a group's parameters and options, as in PyTorch.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device (for CUDA graphs).
        momentum: >= 0; without it there is no state.
        dampening: of the momentum, after the first step.
        weight_decay: added to the gradient, >= 0.
        nesterov: Nesterov's form; needs momentum > 0 and no dampening.
        fogzo: the estimator around the model whose parameters these are.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, and update that.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: of the op; None takes that of ``fogzo``, else the best available.
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
