"""python -m bench.gpu.rehearsal MODULE ARGUMENTS: run it with the backends for a GPU on the CPU."""

import os
import runpy
import sys

os.environ["TRITON_INTERPRET"] = "1"

from cuda_on_host.build import install

install()
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
