"""Lets a process on Linux keep the memory that it has freed, for steps that need it again.

MLX's CPU back end returns every array to malloc, and glibc's malloc returns large ones to the
kernel, which has to clear each page anew when the next step asks for it: a quarter of the
processors' time of a training step of a 135 M model (`scripts/measure_training.py`). What a
process holds at its peak stays the same. Macs and GPUs use Metal's or CUDA's own allocator.
"""

import ctypes
import sys

#: glibc's <malloc.h>: parameters of ``mallopt``, and what they are set to.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1


def keep_freed() -> bool:
    """Keep freed memory for the rest of this process; False where malloc is not glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No mapping of its own for a large block, nothing given back from the end of the heap, and one
    # heap for all threads: what one frees another can use.
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_ARENA_MAX, 1))
    return all(mallopt(parameter, value) for parameter, value in wanted)
