"""Building and choosing kernels, each in a process of its own with a cache of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxq import kernels
from fxq.cli import main
from fxq.kernels import binary

ROOT = Path(__file__).parents[2]
CALL = """
import warnings, torch, fxq.ops
from fxq import kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = torch.ops.fxq.quantize(torch.tensor([0.4, 0.6, float("nan")]), 1.0, 3)
assert y.tolist() == [3, 4, 0], y
print(kernels.info().isa, [f"{w.category.__name__}: {w.message}" for w in caught], sep="|")
"""

needs_compiler = pytest.mark.skipif(kernels.info().compiler is None, reason="no C++ compiler here")


def start(cache, code=CALL, **environment):
    """A new Python with nothing but this cache; a value of None removes the variable."""
    merged = {**os.environ, "FXQ_CACHE": str(cache), "PYTHONPATH": str(ROOT), **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    merged.setdefault("FXQ_ISA", "")
    return subprocess.Popen(
        [sys.executable, "-c", code], env=merged, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    )


def finish(process):
    """(instruction set, warnings, stderr) of a `CALL`."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    isa, _, caught = out.strip().partition("|")
    return isa, caught, err


def call(cache, **environment):
    return finish(start(cache, **environment))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache that holds this machine's binary."""
    if kernels.info().path is None:
        pytest.skip("no native kernels here")
    cache = tmp_path_factory.mktemp("built")
    binary = kernels.info().path
    (cache / binary.name).write_bytes(binary.read_bytes())
    return cache


def binaries(cache):
    return sorted(cache.glob("*.so"))


@needs_compiler
def test_processes_that_start_together_compile_once(tmp_path):
    cache = tmp_path / "new" / "cache"
    results = [finish(process) for process in [start(cache) for _ in range(2)]]
    assert all(isa != "portable" and caught == "[]" for isa, caught, _ in results)
    assert sum("compiling the kernels" in err for _, _, err in results) == 1
    assert len(binaries(cache)) == 1
    assert cache.stat().st_mode & 0o077 == 0  # nobody else may plant a binary


def test_a_cached_binary_is_used_in_silence(built):
    isa, caught, err = call(built)
    assert (isa, caught, err) == (kernels.info().available[0], "[]", "")


@pytest.mark.parametrize("keep", [0, 31, 100, 5000, -1])
def test_a_damaged_binary_is_noticed(tmp_path, built, keep, monkeypatch):
    monkeypatch.setattr(binary, "PACKAGE", tmp_path)
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))
    (whole,) = binaries(built)
    content = whole.read_bytes()
    copy = tmp_path / whole.name
    copy.write_bytes(content)
    assert binary.find() == copy
    copy.write_bytes(content[:keep] if keep >= 0 else content[:9000] + b"?" + content[9001:])
    assert binary.find() is None


@needs_compiler
def test_a_damaged_binary_and_an_interrupted_build_do_no_harm(tmp_path, built):
    """One process is killed while it compiles, another finds half a binary: a third one builds and serves."""
    (whole,) = binaries(built)
    damaged = tmp_path / whole.name.replace("-all.so", f"-{kernels.info().available[0]}.so")
    damaged.write_bytes(whole.read_bytes()[:5000])
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 20\n")
    stuck.chmod(0o755)
    first = start(tmp_path, CXX=str(stuck))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=90)
    assert binaries(tmp_path) == [damaged]
    isa, caught, err = call(tmp_path)
    assert (isa != "portable", caught) == (True, "[]")
    assert "compiling the kernels" in err
    assert binaries(tmp_path) == [damaged]
    assert damaged.stat().st_size > 5000


@needs_compiler
def test_first_use_compiles_for_one_instruction_set_and_a_request_for_another_that_one(tmp_path, built):
    best, other = kernels.info().available[0], "generic"
    if best == other:
        pytest.skip("this processor has one instruction set")
    isa, caught, err = call(tmp_path)
    assert (isa, caught) == (best, "[]")
    assert f"compiling the kernels for {best} " in err
    (first,) = binaries(tmp_path)
    assert first.name.endswith(f"-{best}.so")

    refused = f"from fxq import kernels\nwith kernels.use_isa({other!r}): pass"
    _, err = start(tmp_path, refused).communicate(timeout=60)
    assert f"instruction set '{other}' is not available in this process: {first.name} holds {best}; set FXQ_ISA=" in err
    assert binaries(tmp_path) == [first]
    info, _ = start(tmp_path, "from fxq.cli import main; main(['info'])").communicate(timeout=60)
    assert f"{best} (available: portable, {best}; FXQ_ISA compiles: " in info

    isa, caught, err = call(tmp_path, FXQ_ISA=other)
    assert (isa, caught) == (other, "[]")
    assert f"compiling the kernels for {other} " in err
    assert call(tmp_path, FXQ_ISA=other) == (other, "[]", "")
    assert call(tmp_path) == (best, "[]", "")
    assert len(binaries(tmp_path)) == 2

    (whole,) = binaries(built)
    (tmp_path / whole.name).write_bytes(whole.read_bytes())  # from now on, this one serves whatever is asked for
    first.unlink()
    assert call(tmp_path) == (best, "[]", "")
    assert call(tmp_path, FXQ_ISA=other) == (other, "[]", "")


def test_processors_that_share_a_cache_do_not_share_their_binaries(tmp_path, built, monkeypatch):
    monkeypatch.setattr(binary, "PACKAGE", tmp_path / "none")
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))
    (whole,) = binaries(built)
    of_one = tmp_path / whole.name.replace("-all.so", "-avx512.so")
    of_one.write_bytes(whole.read_bytes())
    assert binary.find("avx512") == of_one
    for isa in ("avx512_vnni", "avx2", "all"):
        assert binary.find(isa) is None
    of_all = tmp_path / whole.name
    of_all.write_bytes(whole.read_bytes())
    for isa in ("avx512", "avx2", "all"):
        assert binary.find(isa) == of_all


def test_the_instruction_sets_compiled_for_are_those_that_the_kernels_detect():
    if not kernels.info().available:
        pytest.skip("no native kernels here")
    assert binary.processor_isas() == kernels.info().available
    assert kernels.info().lacking == ()


def test_a_processor_is_judged_by_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(binary.platform, "machine", lambda: "x86_64")
    file = tmp_path / "cpuinfo"
    assert binary.processor_isas(file) == ()  # nobody knows: all are compiled
    for flags, expected in (
        ("sse2", ("generic",)),
        ("avx2 fma", ("generic",)),
        ("avx2 fma f16c avx_vnni", ("avx_vnni", "avx2", "generic")),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ("avx512", "avx2", "generic")),
        ("avx512f avx512_vnni avx2 fma f16c", ("avx2", "generic")),
    ):
        file.write_text(f"model name\t: x\nflags\t\t: fpu {flags} ht\n")
        assert binary.processor_isas(file) == expected
    monkeypatch.setattr(binary.platform, "machine", lambda: "aarch64")
    assert binary.processor_isas(file) == ("generic",)


@needs_compiler
def test_building_again_is_free(built, capsys):
    (whole,) = binaries(built)
    before = whole.stat().st_mtime_ns
    assert kernels.build(built) == whole
    assert whole.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
    assert not list(built.glob("*.lock"))


def test_without_a_compiler_the_portable_kernels_serve_and_say_why_once(tmp_path):
    isa, caught, _ = call(tmp_path, PATH=str(tmp_path), CXX=None)
    assert isa == "portable"
    assert caught.count("PortableKernelWarning") == 1
    assert "no C++ compiler found" in caught


def test_without_a_compiler_a_binary_made_elsewhere_serves(built):
    isa, caught, _ = call(built, PATH="/nowhere", CXX=None)
    assert (isa, caught) == (kernels.info().available[0], "[]")


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: not today' >&2\nexit 1\n")
    broken.chmod(0o755)
    isa, caught, err = call(tmp_path, CXX=str(broken))
    assert isa == "portable"
    assert "not today" in caught
    assert "failed" in err
    assert not binaries(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    isa, caught, _ = call(blocked / "cache")
    assert isa == "portable"
    assert "set FXQ_CACHE to a writable folder" in caught or "no C++ compiler" in caught


def test_a_folder_to_build_into_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["build", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert "; name a writable folder" in said or "no C++ compiler" in said


def test_portable_on_request_says_nothing(tmp_path):
    assert call(tmp_path, FXQ_ISA="portable") == ("portable", "[]", "")


def test_an_instruction_set_on_request(built):
    for isa in {kernels.info().available[0], "generic"}:
        assert call(built, FXQ_ISA=isa)[:2] == (isa, "[]")


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon"])
def test_an_unknown_instruction_set_is_refused(built, name):
    _, err = start(built, FXQ_ISA=name).communicate(timeout=60)
    assert f"KernelError: instruction set '{name}' is not available" in err
    assert "generic" in err


def test_an_instruction_set_without_native_kernels_is_refused(tmp_path):
    _, err = start(tmp_path, FXQ_ISA="generic", PATH=str(tmp_path), CXX=None).communicate(timeout=60)
    assert "FXQ_ISA=generic, but there are no native kernels" in err


def test_use_isa_restores_and_refuses():
    if not kernels.info().available:
        pytest.skip("no native kernels here")
    before = kernels.info().isa
    with kernels.use_isa("generic"):
        assert kernels.info().isa == "generic"
    assert kernels.info().isa == before
    with pytest.raises(kernels.KernelError, match=r"has .*generic"), kernels.use_isa("mmx"):
        pass


def test_importing_compiles_nothing(tmp_path):
    process = start(tmp_path, code="import fxq.ops")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())
