"""The CUDA kernels compiled for the CPU, so that they run, thread by thread, where there is no GPU."""
