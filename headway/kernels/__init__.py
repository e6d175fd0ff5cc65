"""Faster, never different: each file holds a plain reference, a fast path, and says where the fast
path applies."""

import os

if os.environ.get("HEADWAY_TRITON") == "interpret":
    # read when Triton is imported, which torch.compiler does as soon as a kernel's file is
    os.environ["TRITON_INTERPRET"] = "1"
