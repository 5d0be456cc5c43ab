"""How much of what a process has freed it keeps."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

KEPT = 2**30
"""Bytes: smaller blocks are cut from what the process holds already, and so much of that may be
free. glibc takes no more than fits into an int."""


def keep_freed_memory() -> bool:
    """Let blocks that are freed stay with the process, unless they are larger than `KEPT`.

    glibc gives every large block back to the system at once, and the pages of the next one are
    faulted in and cleared again: in a model, layer by layer. Kept, they are faulted in once. What
    the environment says (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) counts for no more.

    Returns:
        Whether that can be had here: it is glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, KEPT) and libc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT - 1)
    )
