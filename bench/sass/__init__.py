"""Compile the GPU kernels for GPUs that need not be there, and count their machine code.

``python -m bench.sass`` prints a row per variant of Triton's kernels and, where nvcc is found, of those in
CUDA; ``--json FILE`` writes the rows. Nothing is run: a count says what the compiler made, and the margin
is a model's, not a measurement.

Instructions per element: a program runs its prologue once and its tile loop once per tile. Counted
are (prologue + tiles * loop) / elements that a thread handles, for a program with all its tiles. The
loop is found by its backward branch around the wide accesses; the loop over directions inside it counts
n times. Rarely taken branches in its range count too. Left out are NOPs, what comes after the loop (the
element-by-element rest of a tensor) and subroutines that only special values call.

Margin: time that an H200 at its copy bandwidth takes for the bytes, over the time of the busiest
execution pipe; above 1 the kernel should be limited by memory.
"""
