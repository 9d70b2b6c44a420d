"""The limits of one core, measured: 8-bit dot products from registers, and reading memory (peak.cpp)."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fxq.kernels.binary import compiler

ROUNDS = 20_000


class Probes:
    """The two probes, compiled for this process.

    exact_avx2: 8-bit products as AVX2 has them, by way of 16 bits. Raises `OSError` without a compiler or AVX2.
    """

    def __init__(self, exact_avx2: bool = False) -> None:
        self._exact_avx2 = exact_avx2
        command = compiler()
        if command is None:
            raise OSError("no C++ compiler")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peak.so"
            source = Path(__file__).with_name("peak.cpp")
            done = subprocess.run([*command, "-O2", "-shared", "-fPIC", source, "-o", path], capture_output=True)
            if done.returncode:
                raise OSError(f"peak.cpp does not compile here: {done.stderr.decode().strip().splitlines()[0]}")
            self._library = ctypes.CDLL(str(path))
        self._library.dot_rounds.restype = self._library.read_bytes.restype = ctypes.c_int64
        self._library.dot_rounds.argtypes = (ctypes.c_int64, ctypes.c_bool)
        self._library.read_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self.dot_operations: int = self._library.dot_rounds(1, exact_avx2) * ROUNDS
        """How many operations one call of `dot` has, a multiplication and an addition being two."""
        if not self.dot_operations:
            raise OSError("this processor has not even AVX2")

    def dot(self) -> None:
        """Multiply and add 8-bit numbers in registers, with the best instruction that this processor has."""
        self._library.dot_rounds(ROUNDS, self._exact_avx2)

    def read(self, size: int) -> Callable[[], object]:
        """A call that reads a buffer of `size` bytes once."""
        data = torch.ones(-(-size // 128) * 128, dtype=torch.uint8)
        return lambda: self._library.read_bytes(data.data_ptr(), data.numel())
