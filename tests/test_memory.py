"""Freed memory that is kept: no page is made anew for equal tensors."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ld_pruner_hf import memory
from ld_pruner_hf.memory import freed_memory_kept

MB = 2**20


def pages_made(size: int = 100 * MB) -> int:
    """In the last of a few equal steps, each with a tensor of `size` bytes."""
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure() -> None:
    """Run in a process of its own: glibc serves a thread from elsewhere once one of its allocations has failed."""
    pages = 100 * MB // resource.getpagesize()
    with freed_memory_kept():
        with freed_memory_kept():
            assert pages_made() < pages / 100
        assert pages_made() < pages / 100, "still inside of one"
        held = resident()
    assert resident() < held - 90 * MB
    assert pages_made() >= pages / 512, "huge pages at most"


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc"
)
def test_equal_tensors_get_the_same_pages_inside_only():
    done = subprocess.run(
        [sys.executable, "-c", "import test_memory; test_memory.measure()"], cwd=Path(__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    with freed_memory_kept():
        assert memory._inside == 0
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("looked for"))
    with freed_memory_kept():
        pass
