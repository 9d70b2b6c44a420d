"""The kernels and the operators under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
import sys
from pathlib import Path

import pytest

from fxq.kernels.binary import compiler


def test_kernels_and_operators_are_clean_under_sanitizers(tmp_path):
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "empty.cpp").write_text("int main() {}")
    flags = ["-fsanitize=address,undefined", str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run([*command, *flags], check=False, capture_output=True).returncode:
        pytest.skip(f"{command[0]} has no sanitizers")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitize.py"))], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("clean on ")
