import subprocess
import sys

import pytest

from headway.train.allocator import set_allocator

# Frees 64 MiB and reads how much of it is still resident.
PROGRAM = """
import sys, torch
from headway.train.allocator import set_allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert set_allocator(sys.argv[1])
block = torch.ones(16 << 20)
before = resident()
del block
print((before - resident()) >> 20)
"""


def test_system_policy_changes_nothing():
    assert not set_allocator("system")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_keep_holds_freed_memory_and_return_gives_it_back():
    given_back = {
        policy: int(subprocess.check_output([sys.executable, "-c", PROGRAM, policy], text=True))
        for policy in ("keep", "return")
    }
    assert given_back["return"] >= 60 and given_back["keep"] <= 4
