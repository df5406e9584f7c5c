"""Time a whole training step: this package's methods, and others, over the same model without quantization.

``float`` is a stock loop with PyTorch's fused AdamW and no quantization: all ratios are of it. In the same loop
are torchao's QAT (``torchao``: int4 weights in groups of 32; ``-compiled``: each of its layers by
torch.compile; ``-w4a8``: int8 inputs too) and ``lsq``, a linear layer with LSQ of 2 bits in plain autograd.
``eager`` is FOGZO in plain PyTorch, ``mezo`` MeZO's loop.

Of this package, with its AdamW and LSQ of 2 bits: ``modules`` has no Fogzo; ``ste`` is straight-through by
Fogzo's gradient pass, ``guided`` adds guided noise, and ``fogzo`` probes. ``ste-int4`` and ``ste-w4a8``
have torchao's groups and bits; their inputs have no zero point.

All train on the same micro-batches, in turns, one step each. Four turns give one ratio of two methods' times,
and the table has the median of these. ``rest`` is all but forwards and backwards: Q, norm, probes, estimate,
optimizer. Every method has weights of its own. Several values of an option that takes them are settings of
their own, each measured by itself.

After that, of each method: ``calls`` of this package's ops in a step and the bytes that they read and write,
inside of passes (Q and its backward) and outside of them, with their time by op (on a GPU each waits for its
end, so that its parts sum to more than a step); ``launches`` of kernels, whoever's, on a GPU; and ``peak``, the
most memory that PyTorch held for weights, gradients, optimizer, probes and activations of three steps.

The file of ``--json`` is written after every fourth turn. A method that fails is left out, with its reason;
where it takes the device with it, ``--resume`` measures the others anew.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler says on the screen when it starts and stops
