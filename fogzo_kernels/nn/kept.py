"""Kept: Q of a weight, which evaluation makes once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from ..ops.listop import is_plain, watched
from .parameter import VALUES, Values
from .view import LOCAL

if TYPE_CHECKING:
    from .quantized import QuantizedWeight


class Kept:
    """The values that a module's weight has in forwards, while weight, alpha and quantizer stay as they are.

    Versions and addresses tell. ``memory`` holds the memory, so that no other tensor gets its address. An edit
    in place through ``.data`` has neither: ``train()``, ``eval()`` and a forward with grad forget the values.
    """

    def __init__(self, module: QuantizedWeight, value: Tensor) -> None:
        weight, alpha = module.latent, module.alpha
        self.value, self.weight, self.alpha, self.on_gpu = value, weight, alpha, weight.is_cuda
        self.memory = weight.detach(), alpha.detach()
        self.versions = value._version, weight._version, alpha._version
        self.addresses = weight.data_ptr(), alpha.data_ptr()
        self.quantizer, self.learned = module.quantizer, module.quantizer.learned
        self.rotated, self.backend = module.quantizer.block > 0, module.backend

    def serves(self, module: QuantizedWeight, input: object) -> bool:
        """Whether a module outside of a pass may run with the value again. It is asked in each forward."""
        weight, alpha, parameters, how = self.weight, self.alpha, module._parameters, module.weight_quantizer
        return (
            not (is_grad_enabled() or watched())
            and module.registered is weight
            and (parameters if self.learned else module._buffers).get("alpha") is alpha
            and (how.quantizer is self.quantizer and how.backend == self.backend)
            and self.versions == (self.value._version, weight._version, alpha._version)
            and self.addresses == (weight.data_ptr(), alpha.data_ptr())
            and weight.is_set_to(self.memory[0])
            and (self.learned or not alpha.requires_grad)
            and isinstance(input, Tensor)
            and not (self.on_gpu and torch.cuda.is_current_stream_capturing())
        )


def can_keep(module: QuantizedWeight) -> bool:
    """Whether the module evaluates, and versions tell of every edit of its own tensors."""
    if module.training or is_grad_enabled() or module.pass_weight is not None:
        return False
    weight, alpha = module.registered, module.alpha
    if type(weight) is not nn.Parameter or not is_plain(weight, alpha):
        return False
    if module.placement is not LOCAL or weight.is_inference() or alpha.is_inference():  # these have no version
        return False
    shared = weight.is_cpu and (weight.is_shared() or alpha.is_shared())  # another process may write it
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()  # the graph quantizes in each run
    return not (shared or capturing)


def forward_weight(module: QuantizedWeight, input: object) -> Tensor:
    """What the module's forward of an input runs with.

    Without grad, in ``eval()``, it is made once and kept while weight and alpha stay as they are.
    """
    if is_compiling():
        return module.made_weight()
    values: Values = vars(module)[VALUES]
    kept: Kept | None = values.kept
    if kept is not None and module.pass_weight is None and kept.serves(module, input):
        return kept.value
    values.kept = None
    if not can_keep(module):
        return module.made_weight()
    with torch.inference_mode(False), torch.no_grad():  # a tensor that has a version
        values.kept = kept = Kept(module, module.made_weight())
    return kept.value
