"""python -m ptx MODULE ARGUMENTS: runs a module whose GPU kernels run in the executor."""

import runpy
import sys

from . import install

if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
