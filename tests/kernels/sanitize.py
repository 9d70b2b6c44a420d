"""Compile the kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer, and run sanitize.cpp.

Exits 0 where it finds nothing. `make sanitize` runs it.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fxq.kernels.binary import PACKAGE, compiler

FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{PACKAGE}",
)

OF_TORCH = re.compile(r'#include "(checks|tensor).h"')


def main() -> int:
    command = compiler()
    if command is None:
        sys.exit("no C++ compiler found")
    sources = [
        Path(__file__).with_suffix(".cpp"),
        *(p for p in PACKAGE.glob("*.cpp") if not p.name.startswith("ops_") and not OF_TORCH.search(p.read_text())),
    ]
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def build(source: Path, target: Path) -> None:
            subprocess.run([*command, *FLAGS, "-c", str(source), "-o", str(target)], check=True)

        with ThreadPoolExecutor() as pool:
            list(pool.map(build, sources, objects))
        program = str(Path(folder) / "sanitize")
        subprocess.run([*command, *FLAGS, *map(str, objects), "-o", program], check=True)
        return subprocess.run([program], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
