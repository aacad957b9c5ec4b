"""What only a CPU needs."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_BYTES = 2**20


def return_freed_memory() -> bool:
    """Make glibc give back every freed block of 1 MiB or more at once; return whether that could be set.

    By default its threshold grows with the blocks that are freed, up to 32 MiB, and activations below it come from a
    heap that fragments: the peak of a step of SmolLM2 at 768 tokens was 2.6 GB so and 2.1 GB with a fixed threshold, in
    no more time. Elsewhere than under glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BYTES))
    except AttributeError:  # another C library
        return False
