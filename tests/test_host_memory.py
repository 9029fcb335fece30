"""A training on the CPU keeps the memory that a step frees for the next step."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys, torch
from simclr_dist.parallel.host_memory import free_as_usual, keep_freed_memory

MIB = 2**20

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(40 * MIB, dtype=torch.uint8) for _ in range(2)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
as_usual = [faults_of_a_step() for _ in range(3)][-1]
keep_freed_memory()
kept = [faults_of_a_step() for _ in range(30)][-1]
held = resident()
free_as_usual()
print(json.dumps([as_usual, kept, (held - resident()) / MIB]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another libc than glibc")
def test_large_blocks_are_used_again_and_returned_at_the_end() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    as_usual, kept, returned_mib = json.loads(answer.stdout)
    assert as_usual > 100  # 20,480 pages, less where pages are huge
    assert kept < as_usual / 20
    assert returned_mib > 40
