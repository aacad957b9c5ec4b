"""Freed memory is given back, seen from outside the process's own bookkeeping."""

import subprocess
import sys

import pytest

# Blocks of 24 MiB, freed once so that glibc's own threshold would grow past them, then every second of many freed.
PROGRAM = """
import sys, torch
from lightning_lab.training.cpu import return_freed_memory
if sys.argv[1] == "set":
    assert return_freed_memory()
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
for _ in range(3):
    del_me = torch.ones(6 * 2**20); del del_me
before = held()
blocks = [torch.ones(6 * 2**20) for _ in range(40)]
blocks = blocks[::2]
print(held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_blocks_are_given_back() -> None:
    def held(how: str) -> float:
        result = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return float(result.stdout)

    assert held("set") == pytest.approx(20 * 24, abs=40)  # MiB
    assert held("default") > 30 * 24
