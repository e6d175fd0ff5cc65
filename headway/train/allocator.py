"""The policy of the C allocator for freed memory. On CPUs every training step frees and allocates
the same buffers.

By default glibc returns large blocks to the kernel, and the next step pays a page fault per 4 KiB
to get them back. A process that keeps them saves those faults, at the price of fragmentation."""

import ctypes
import sys
from typing import Literal

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h
KEEP, RETURN = 1 << 30, 1 << 20

Policy = Literal["system", "keep", "return"]


def set_allocator(policy: Policy) -> bool:
    """Set the policy for this process; return False where the C library is not glibc, or for
    `system`.

    `keep`: freed blocks stay with the process. `return`: blocks of a MiB or more are returned to
    the kernel at once."""
    if policy == "system" or not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return False
    mmap, trim = (KEEP, 2**31 - 1) if policy == "keep" else (RETURN, RETURN)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, mmap) and libc.mallopt(M_TRIM_THRESHOLD, trim))
