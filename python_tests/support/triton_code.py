"""The machine code that Triton makes of its kernels, for the tests of it."""

import functools


@functools.cache
def triton_rows(arch):
    """By name, each compiled when it is asked for."""
    from bench.sass import triton

    found = {str(variant): variant for variant in triton.variants()}
    return functools.cache(lambda name: triton.row(found[name], arch))
