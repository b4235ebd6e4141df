"""What the server that forks the ranks of tests does once, so that no rank has to: the compiler's first start.

Nothing here changes what is compiled. Names of torch that begin with an underscore are left alone where a release has
none of them: then ranks only take longer.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import tempfile
from collections.abc import Callable

import torch
import torch._dynamo.guards
import torch._inductor.compile_fx
import torch._inductor.config
import tqdm

_LOCK = tempfile.TemporaryFile()  # noqa: SIM115 (for as long as there are ranks)


def _one_at_a_time(compile_graph: Callable) -> Callable:
    """Ranks compile the same graphs at the same moment. One does, and the others find what it has stored."""

    @functools.wraps(compile_graph)
    def compile_or_find(*args, **kwargs):
        fcntl.lockf(_LOCK, fcntl.LOCK_EX)  # of a process, not of a file descriptor: forks exclude each other
        try:
            return compile_graph(*args, **kwargs)
        finally:
            fcntl.lockf(_LOCK, fcntl.LOCK_UN)

    return compile_or_find


def _prepare_compiler() -> None:
    if inner := getattr(torch._inductor.compile_fx, "_compile_fx_inner", None):
        torch._inductor.compile_fx._compile_fx_inner = _one_at_a_time(inner)
    # How long a graph's guards take, for a log: measured with an empty cache, which is filled with 32 MB each time.
    if hasattr(torch._dynamo.guards, "profile_guard_manager"):
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # A small graph finds compiler and processor, and imports the rest. In one thread, for forks.
    tqdm.tqdm.monitor_interval = 0  # the compiler shows its progress, which would start a thread
    threads = torch._inductor.config.compile_threads
    torch._inductor.config.compile_threads = 1
    torch.set_num_threads(1)
    x = torch.ones(7, 5, requires_grad=True)
    torch.compile(lambda x: torch.nn.functional.silu(x @ x.T).sum())(x)
    torch.compiler.reset()
    torch._inductor.config.compile_threads = threads


def _keep_freed_memory() -> None:
    """Not given back to the kernel, which would have to clear it each time: a fifth of a small step's time."""
    with contextlib.suppress(AttributeError):  # of the GNU library alone
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -2, -3):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**25)


_prepare_compiler()
_keep_freed_memory()
gc.collect()
gc.freeze()  # what is there stays: no rank's collector looks at it, and so copies it
