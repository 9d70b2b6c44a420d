"""Threads that share the steps of a block, where one of them fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from fxq.kernels import binary

CALL = """
import ctypes, sys, torch
torch.set_num_threads(2)
print(ctypes.CDLL(sys.argv[1]).shares_behind_one_that_throws())
"""


def test_nobody_waits_for_a_thread_that_has_failed(tmp_path):
    command = binary.compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    source, library = Path(__file__).with_name("together.cpp"), tmp_path / "together.so"
    sources = [source, binary.PACKAGE / "scratch.cpp"]
    include = [f"-I{binary.PACKAGE}", "-isystem", str(binary.TORCH / "include")]
    linked = [f"-L{binary.TORCH / 'lib'}", *binary._LINK]
    step = [*command, *binary._COMPILE, *include, *map(str, sources), "-o", str(library), *linked]
    subprocess.run(step, check=True)
    call = [sys.executable, "-c", CALL, str(library)]
    found = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == 2, "the other thread goes on to the last step, and does its shares"
