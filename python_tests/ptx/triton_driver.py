"""Triton without a GPU: its compiler makes PTX as for one, and the executor runs it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from . import launches
from .build import ROOT
from .decode import Kernel
from .memory import runs_on_cpu, touchable, watch
from .modes import ARCH, FUSE, number, on_device
from .text import Module


class Compiler(CUDABackend):
    """Triton's, which ends with PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], *args: Any) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]


@contextmanager
def to_machine_code() -> Iterator[None]:
    """Inside, Triton's own compiler makes cubins, in a cache of their own: PTX has the same names there."""
    own = backends["nvidia"]
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(ROOT / "build/cubins")
        backends["nvidia"] = Backend(CUDABackend, own.driver)
        try:
            yield
        finally:
            backends["nvidia"] = own


class Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills and the most threads of a block."""
        found = Kernel(Module(kernel.decode()), name, number(FUSE))
        return found, found, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


def runtime(values: Iterable[Any], types: Iterable[Any]) -> Iterator[Any]:
    """Arguments that a kernel gets when it runs, those of tuples one by one."""
    for value, ty in zip(values, types, strict=True):
        if isinstance(ty, tuple):
            yield from runtime(value, ty)
        elif ty != "constexpr":
            yield value


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.threads, self.shared = metadata.num_warps * 32, metadata.shared
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise NotImplementedError("the executor has no clusters and no scratch memory")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        kernel: Kernel,
        packed: Any,
        metadata: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        given = [*runtime(args, self.types)]
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
        scratch = [0] * (len(kernel.parameters) - len(values))  # addresses of scratch memory, which it has not
        launches.run(
            kernel, x * y * z, self.threads, kernel.pack(values + scratch), self.shared, touchable(given)
        )


class Driver(DriverBase):
    utils, launcher_cls = Utils(), Launcher

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", number(ARCH), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(number(ARCH), 10)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the executor measures no time")


def install() -> None:
    """Let the backend ``triton`` run on CPU tensors, in this process."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    backends["nvidia"] = Backend(Compiler, Driver)
    driver.set_active(Driver())
    from fogzo_kernels.backends import triton as backend
    from fogzo_kernels.backends.triton import launch

    assert not triton.knobs.runtime.interpret
    backend.unavailable = runs_on_cpu(backend.unavailable)
    if on_device():
        launch.on_host = lambda t: False
    watch(backend)
