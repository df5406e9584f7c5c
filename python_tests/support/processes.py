"""Processes of gloo, plain and as accelerate's launchers start them; and its state, that of a process."""

import multiprocessing
import os
import runpy
import signal
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: What takes long to load. A process that is started has it, where it is installed.
HEAVY = [
    "pytest", "fogzo_kernels", "torch.distributed.fsdp", "torch._dynamo", "transformers",
    "transformers.models.llama.modeling_llama", "accelerate", "lightning.pytorch", "torch.utils.tensorboard",
    "triton.compiler",
]  # fmt: skip
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")


def server():
    """Starts processes that have loaded what most of them take."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def run_code(code, folder, *arguments, **environment):
    """Runs a program in a folder, as ``python program.py`` does; returns its exit status and what it printed.

    Its process has loaded ``HEAVY`` before, which saves seconds, and no other variables or arguments.
    """
    program = folder / "program.py"
    program.write_text(code)
    process = server().Process(target=as_main, args=(str(program), arguments, environment))
    process.start()
    process.join()
    return process.exitcode, (folder / "output.txt").read_text()


def as_main(program, arguments, environment):
    os.chdir(os.path.dirname(program))
    for name in ("TRITON_INTERPRET", "FOGZO_BACKEND"):
        os.environ.pop(name, None)
    os.environ |= environment
    torch.set_num_threads(1)  # small tensors; tests run over processes
    with open("output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def start(worker, args, count):
    """Run it in so many processes, and wait for them."""
    server()
    mp.start_processes(worker, args, nprocs=count, start_method="forkserver")


def meeting_point():
    """Where launched processes find each other while this is held: on a port that no other program can take."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def as_launched(rank, port, count=2):
    """Process ``rank`` of so many on the CPU, as torchrun starts one: it joins whoever holds the port."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def two_of(worker, folder):
    """What each of two processes left in ``folder`` as RANK.pt; a worker takes rank, folder and port."""
    point = meeting_point()
    start(worker, (str(folder), point.port), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def leave():
    """The end of a worker whose model is wrapped by DDP: the process ends with its group.

    PyTorch 2.13 may wait for ever where a destroyed group is freed with the model: the freeing thread holds
    Python's lock and waits for the group's own thread, which needs that lock.
    """
    dist.barrier()


def spawned(case, folder, processes=2):
    """What each of several processes found; an error of a process is its message."""
    start(one_process, (case, str(folder), processes), processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def one_process(rank, case, folder, processes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    dist.barrier()  # a process that ends before the others are connected fails them
    try:
        found = case(rank)
    except (RuntimeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def die_after(calls, seconds):
    """Kill this process so many calls of functions from here, and so long after the last: in C++, maybe.

    Calls are counted, because a fast machine and a slow one would be elsewhere at the same time.
    """

    def count(frame, event, arg):
        nonlocal calls
        calls -= event in ("call", "c_call")
        if calls <= 0:
            sys.setprofile(None)
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM kills, as nobody handles it

    sys.setprofile(count)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
