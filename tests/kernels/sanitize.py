"""Compile the kernels and the operators under AddressSanitizer and UndefinedBehaviorSanitizer, and run them.

First the kernels without torch, for every instruction set, by sanitize.cpp; then the whole library, with the best of
this processor's, by the operators' tests. Exits 0 where it finds nothing. `make sanitize` runs it.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fxq.kernels import binary

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
FLAGS = ("-std=c++17", "-ffp-contract=off", f"-I{binary.PACKAGE}", *SANITIZERS)
OF_TORCH = re.compile(r'#include "(checks|tensor).h"')
TESTS = ("tests/ops", "tests/kernels/test_chain.py", "tests/kernels/test_winograd.py")
ROOT = Path(__file__).parents[2]


def kernels(command: list[str], folder: Path) -> int:
    sources = [
        Path(__file__).with_suffix(".cpp"),
        *(
            path
            for path in binary.PACKAGE.glob("*.cpp")
            if not path.name.startswith("ops_") and not OF_TORCH.search(path.read_text())
        ),
    ]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def build(source: Path, target: Path) -> None:
        subprocess.run([*command, *FLAGS, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, sources, objects))
    program = str(folder / "sanitize")
    subprocess.run([*command, *FLAGS, *map(str, objects), "-o", program], check=True)
    return subprocess.run([program], check=False).returncode


def operators(command: list[str], folder: Path) -> int:
    isa = (*binary.processor_isas(), "generic")[0]
    # The flags go last, as -O2 would take minutes to compile.
    sanitizing = folder / "c++"
    sanitizing.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@" {shlex.join(SANITIZERS)}\n')
    sanitizing.chmod(0o755)
    os.environ |= {"CXX": str(sanitizing), "FXQ_CACHE": str(folder), "FXQ_ISA": isa}
    built = binary.build(folder, isa)
    if binary.find(isa) != built:
        sys.exit(f"{binary.find(isa)} goes before {built}: remove it")
    runtimes = [
        subprocess.check_output([*command, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # What a sanitizer says as it ends the process goes past pytest.
    options = ("-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-k", "not portable and not opcheck")
    return subprocess.run([sys.executable, "-m", "pytest", *options, *TESTS], cwd=ROOT, env=environment).returncode


def main() -> int:
    command = binary.compiler()
    if command is None:
        sys.exit("no C++ compiler found")
    with tempfile.TemporaryDirectory() as folder:
        return kernels(command, Path(folder)) or operators(command, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
