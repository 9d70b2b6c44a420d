"""Compiling the kernels, once: into a per-user cache at first use, or ahead of time into a folder of choice.

A binary is named after everything it depends on and what it holds: `fxq-<sources, flags, torch, platform>-<compiler>-
<instruction set>.so`. At first use that is the operators with the kernels for the one set that will run, as those for
the others would take three times as long; `all` ahead of time, which goes before any other. It ends in its own SHA-256,
so that a damaged file is noticed before it is loaded. It appears under its name complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fxq.errors import KernelError

PACKAGE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
_SOURCES = sorted(PACKAGE.glob("*.cpp"))
_HEADERS = sorted(PACKAGE.glob("*.h"))
_COMPILE = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add rounds once where the contract rounds twice
    "-fno-math-errno",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10, the oldest release that fxq supports
)
_KERNELS = ("-O2",)
# They check and call: -O2 would make one row of a 64 x 64 layer some 3 % faster, more rows and whole models 0 to 2 %,
# and take longer to compile.
_OTHERS = ("-O1", "-finline-small-functions")
_LINK = ("-shared", "-ltorch_cpu")
ALL = "all"
# What the kernels for each instruction set, kernels_<name>.cpp, ask of the processor, in Linux' words; the best first.
# dispatch.cpp asks the processor itself.
_NEEDS = {
    "avx512_vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set[str](),
}
_TIMEOUT = 600
_DIGEST_BYTES = 32


def compiler() -> list[str] | None:
    """The C++ compiler as the start of a command line: $CXX, else g++, c++ or clang++; None where there is none."""
    for command in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        parts = shlex.split(command) if command else []
        found = shutil.which(parts[0]) if parts else None
        if found:
            return [found, *parts[1:]]
    return None


def cache() -> Path:
    """The folder for binaries compiled at first use: $FXQ_CACHE, else $XDG_CACHE_HOME/fxq, else ~/.cache/fxq."""
    if chosen := os.environ.get("FXQ_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxq"


def processor_isas(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The instruction sets with kernels that this processor has, the best first; none where it does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("generic",)
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    return () if flags is None else tuple(isa for isa, needs in _NEEDS.items() if needs <= flags)


def find(isa: str = ALL) -> Path | None:
    """An undamaged binary for these sources, this torch and platform that holds `isa`: all sets before that one alone,
    beside the sources before the cache.

    The cache also asks for the present compiler, where there is one; a binary made ahead of time may come from another.
    """
    source_key, compiler_key = _keys()
    places = [(PACKAGE, "*"), (cache(), compiler_key or "*")]
    patterns = [(folder, f"fxq-{source_key}-{key}-{held}.so") for held in (ALL, isa) for folder, key in places]
    candidates = (path for folder, pattern in patterns for path in sorted(folder.glob(pattern)))
    return next((path for path in candidates if _is_whole(path)), None)


def build(directory: Path | None = None, isa: str = ALL) -> Path:
    """Compile into `directory` (created; None means the package itself) unless it is there already.

    isa: the one instruction set that it is to hold, or all. Where the folder is neither the package nor the cache,
    FXQ_CACHE must name it at run time. Says on stderr what it does.
    Raises `KernelError` without a compiler, on a compiler error, or where the folder cannot be written.
    """
    directory = PACKAGE if directory is None else directory
    command = compiler()
    if command is None:
        raise KernelError("no C++ compiler found (looked for $CXX, g++, c++, clang++); install one, e.g. g++")
    path = directory / "fxq-{}-{}-{}.so".format(*_keys(), isa)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(directory / f"{path.name}.lock"):
            if not _is_whole(path):  # another process may have been first
                _compile(command, path, isa)
    except OSError as error:
        remedy = "set FXQ_CACHE to a writable folder" if directory == cache() else "name a writable folder"
        raise KernelError(f"cannot write {directory} ({error}); {remedy}") from error
    return path


def _keys() -> tuple[str, str]:
    """Of all that shapes the binary but the compiler, and of the compiler ('' without one)."""
    flags = (_COMPILE, _KERNELS, _OTHERS, _LINK)
    sources = hashlib.sha256(repr((flags, torch.__version__, sys.platform, platform.machine())).encode())
    for file in (*_HEADERS, *_SOURCES):
        sources.update(file.name.encode() + file.read_bytes())
    command = compiler()
    if command is None:
        return sources.hexdigest()[:16], ""
    program = Path(command[0]).resolve()
    stat = program.stat()  # asking it for its version would take longer than loading the kernels
    identity = repr((command, str(program), stat.st_size, stat.st_mtime_ns))
    return sources.hexdigest()[:16], hashlib.sha256(identity.encode()).hexdigest()[:8]


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when its holder ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows: two processes then compile the same thing, harmlessly
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who still waits for it finds the binary, or builds without harm


def _compile(command: list[str], path: Path, isa: str) -> None:
    what = f"the kernels for {'all instruction sets' if isa == ALL else isa}"
    print(f"fxq: compiling {what} with {command[0]}, once ...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="fxq-build-") as scratch:
            library = _compile_in(command, Path(scratch), isa)
            content = library.read_bytes()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            try:
                file.write(content + hashlib.sha256(content).digest())
                Path(file.name).chmod(0o755)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    print(f"{time.perf_counter() - start:.1f} s -> {path}", file=sys.stderr)


def _compile_in(command: list[str], scratch: Path, isa: str) -> Path:
    # Beside the kernels, reading torch's headers takes longest: the other sources are compiled as one, which reads them
    # once. What takes longest starts first.
    others = scratch / "others.cpp"
    kernels = [PACKAGE / f"kernels_{name}.cpp" for name in (_NEEDS if isa == ALL else (isa,))]
    rest = [source for source in _SOURCES if not source.name.startswith("kernels_")]
    others.write_text("".join(f'#include "{source}"\n' for source in rest), "utf-8")
    compile_ = (*command, *_COMPILE, "-isystem", str(TORCH / "include"))
    objects = {source: scratch / f"{source.stem}.o" for source in (others, *kernels)}
    steps = [
        [*compile_, *(_OTHERS if source == others else _KERNELS), "-c", str(source), "-o", str(to)]
        for source, to in objects.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, steps))
    library = scratch / "fxq.so"
    _run([*command, *map(str, objects.values()), "-o", str(library), f"-L{TORCH / 'lib'}", *_LINK])
    return library


def _run(step: list[str]) -> None:
    try:
        result = subprocess.run(step, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{step[0]} could not compile the kernels: {error}") from error
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-3:]
        raise KernelError(f"{step[0]} could not compile the kernels: {'; '.join(errors[:3])}\n  {shlex.join(step)}")
