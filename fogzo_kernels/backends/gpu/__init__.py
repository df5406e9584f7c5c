"""Tables that tell the kernels of a GPU where the tensors of a list lie."""
