"""One layer, uint8 in and uint8 out: y = relu(x w^T + b), fxq against torch's own int8 ops and the limits of the core.

    python -m benchmarks.layers [--json FILE] | [--grid [M ...]]

x: uint8 [M, K]; w: int8 [N, K], a scale per row; every contestant packs its weight ahead of time. Before it is timed,
its output is held against exact arithmetic: one that is off by more than a single step takes no part. Operators are
called by `_op`, the function of C++ that torch's wrapper in Python, `OpOverload.__call__`, calls: so do the models that
fxq returns (fxq/codegen.py), and `F.linear` has no such wrapper either.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peak import Probes
from benchmarks.timing import Call, interleave, median_us, ratio
from fxq import kernels, numerics
from fxq.ops import chain
from fxq.ops.chain import Chain

SHAPES = (
    (1, 64, 64),
    (1, 768, 768),
    (1, 768, 3072),
    (1, 4096, 4096),
    (16, 768, 3072),
    (64, 256, 256),
    (128, 384, 1536),
    (128, 768, 3072),
    (512, 1024, 1024),
    (1024, 1024, 4096),
)
GRID = tuple(product([2**i for i in range(12)], (64, 256, 1024, 4096), (64, 256, 1024, 4096)))
TORCH_INT8 = ("torch x86", "torch fbgemm", "torch onednn", "torch qlinear_pointwise")
Shape = tuple[int, int, int]
L2 = 1 << 20
"""Bytes; a weight that is larger must be read from further away at every call with few rows."""


@dataclass(frozen=True)
class Layer:
    """Operands of one shape, and what exact arithmetic makes of them."""

    shape: Shape
    x: Tensor = field(init=False)
    w: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    s_w: Tensor = field(init=False)
    s_x: float = 0.02
    z_x: int = 117
    s_y: float = field(init=False)

    def __post_init__(self) -> None:
        m, k, n = self.shape
        make = torch.Generator().manual_seed(m * k * n)
        fill = partial(object.__setattr__, self)
        fill("x", torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=make))
        fill("w", torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=make))
        fill("bias", torch.randn(n, generator=make))
        fill("s_w", torch.rand(n, generator=make) * 0.01 + 0.001)
        fill("s_y", math.sqrt(k) * 74 * 74 * self.s_x * 0.006 * 3 / 255)  # three deviations fill the 255 steps

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What fxq's op takes: packed weight, folded int32 bias, float32 multiplier."""
        w, s_w = self.w.numpy(), self.s_w.numpy()
        bias = numerics.fold_bias(self.bias.numpy(), w, self.s_x, self.z_x, s_w).astype("int32")
        multiplier = numerics.requantize_multiplier(self.s_x, s_w, self.s_y)
        return torch.from_numpy(numerics.pack(w)), torch.from_numpy(bias), torch.from_numpy(multiplier)


def fxq_call(layer: Layer) -> Callable[[], Tensor]:
    """What lowered models call where a linear stands by itself: a chain of one."""
    weight, bias, multiplier = layer.packed()
    alone = Chain((chain.Layer(weight, layer.shape[1], bias, multiplier),), quantize=None, to_float=False)
    x, program, op = layer.x, chain.encode(alone), chain.qchain._op
    return lambda: op(x, program)


def engine_call(engine: str, layer: Layer) -> Callable[[], Tensor]:
    """`torch.ops.quantized.linear_relu` of one engine; a quantized tensor goes in and comes out."""
    torch.backends.quantized.engine = engine
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
    no_zero_points = torch.zeros(len(layer.s_w), dtype=torch.int64)
    w = torch._make_per_channel_quantized_tensor(layer.w, layer.s_w.double(), no_zero_points, 0)
    x = torch._make_per_tensor_quantized_tensor(layer.x, layer.s_x, layer.z_x)
    packed = torch.ops.quantized.linear_prepack(w, layer.bias)
    op = torch.ops.quantized.linear_relu.default._op
    return lambda: op(x, packed, layer.s_y, 0)


def pointwise_call(layer: Layer) -> Callable[[], Tensor]:
    """`torch.ops.onednn.qlinear_pointwise`, which inductor's int8 models call; plain uint8 tensors."""
    packed = torch.ops.onednn.qlinear_prepack(layer.w, list(layer.x.shape))
    zeros = torch.zeros(len(layer.s_w), dtype=torch.int64)
    op = torch.ops.onednn.qlinear_pointwise.default._op
    before = (layer.x, layer.s_x, layer.z_x, packed, layer.s_w, zeros, layer.bias, layer.s_y, 0)
    return lambda: op(*before, torch.uint8, "relu", [], "")


def int_mm_call(layer: Layer) -> Callable[[], Tensor]:
    """`torch._int_mm`: the int8 product alone, to int32, no zero points and no epilogue; x - 128 takes x's place."""
    x, w = (layer.x.to(torch.int16) - 128).to(torch.int8), layer.w.t()
    return lambda: torch._int_mm(x, w)


def float_call(layer: Layer) -> Callable[[], Tensor]:
    """The float32 layer."""
    x, w = (layer.x.float() - layer.z_x) * layer.s_x, layer.w.float() * layer.s_w[:, None]
    return lambda: F.linear(x, w, layer.bias).relu_()


CONTESTANTS: dict[str, Callable[[Layer], Callable[[], Tensor]]] = {
    "fxq": fxq_call,
    "torch float32": float_call,
    **{f"torch {engine}": partial(engine_call, engine) for engine in ("x86", "fbgemm", "onednn")},
    "torch qlinear_pointwise": pointwise_call,
    "torch._int_mm": int_mm_call,
}


def check(name: str, y: Tensor, layer: Layer) -> str:
    """Hold an output against exact arithmetic; a note for the table. Raises `ArithmeticError` beyond one step."""
    if name == "torch._int_mm":
        expected = (layer.x.double() - 128) @ layer.w.double().t()
        if not torch.equal(y.double(), expected):
            raise ArithmeticError("not the exact product")
        return "exact, no epilogue"
    if not y.is_quantized and y.is_floating_point():
        return "float"
    q = y.int_repr() if y.is_quantized else y
    expected = kernels.portable("qlinear")(layer.x, *layer.packed(), 0, 0, 255)
    off = (q.int() - expected.int()).abs()
    if int(off.max()) > (0 if name == "fxq" else 1):
        raise ArithmeticError(f"off by up to {int(off.max())} steps")
    share = float((off > 0).double().mean())
    return f"{share:.2%} off by one" if share else "exact"


def run_shape(shape: Shape, threads: tuple[int, ...], seconds: float, names: list[str], probes: Probes | None) -> Any:
    """All contestants on one shape, each with each number of threads, in turns; a row of the results."""
    layer = Layer(shape)
    calls: dict[tuple[str, int], Call] = {}
    notes: dict[str, str] = {}
    torch.set_num_threads(max(threads))
    for name in names:
        try:
            call = CONTESTANTS[name](layer)
            notes[name] = check(name, call(), layer)
        except (RuntimeError, ArithmeticError, AttributeError, NotImplementedError) as error:
            notes[name] = f"no part: {str(error).splitlines()[0]}"
            if name == "fxq":
                raise
        else:
            calls |= dict.fromkeys([(name, count) for count in threads], call)
    m, k, n = shape
    if probes:
        calls |= {("peak", 1): probes.dot, ("read", 1): probes.read(k * n)}
    times = interleave(calls, seconds, before=lambda key: torch.set_num_threads(key[1]))
    row: dict[str, Any] = {"M": m, "K": k, "N": n, "notes": notes, "threads": {}}
    for count in threads:
        own = {name: value for (name, t), value in times.items() if t == count and name in notes}
        base = own["fxq"]
        peers = {name: ratio(value, base) for name, value in own.items()}
        us = median_us(base)
        row["threads"][str(count)] = {
            "us": {name: median_us(value) for name, value in own.items()},
            "ratio": peers,
            "best int8": min((peers[name] for name in TORCH_INT8 if name in peers), default=None),
            "gops": round(2 * m * k * n / us / 1e3, 1),
        }
    if probes:
        operations = 2 * m * k * n
        peak = ratio(times["peak", 1], times["fxq", 1]) * operations / probes.dot_operations
        row["of peak"] = round(peak, 3)
        row["of bandwidth"] = round(ratio(times["read", 1], times["fxq", 1]), 3)
    if len(threads) > 1:
        row["scaling"] = ratio(times["fxq", threads[0]], times["fxq", threads[-1]])
    return row


def run(shapes: tuple[Shape, ...] = SHAPES, seconds: float = 1.0, threads: tuple[int, ...] = (1, 2)) -> Any:
    """The results of all shapes, as they go into the JSON file; prints a line for each."""
    held = os.environ.get("FXQ_ISA") == "avx2"
    try:
        probes, why = Probes(exact_avx2=held), ""
    except OSError as error:
        probes, why = None, str(error)
    names = ["fxq", "torch float32"] if held else list(CONTESTANTS)
    rows = []
    for i, shape in enumerate(shapes, 1):
        row = run_shape(shape, threads, seconds, names, probes)
        rows.append(row)
        print(f"  [{i}/{len(shapes)}] {line(row)}", flush=True)
    return {"isa": kernels.info().isa, "probes": why or "measured", "rows": rows}


def run_grid(rows: list[int], seconds: float = 0.3, threads: tuple[int, ...] = (1, 2)) -> None:
    """fxq and torch's int8 ops on every K and N of the grid for these M; prints where one of torch's is faster."""
    names, below = ["fxq", *TORCH_INT8], []
    for shape in [shape for shape in GRID if shape[0] in rows]:
        row = run_shape(shape, threads, seconds, names, None)
        print(f"  {line(row)}", flush=True)
        below += [f"{shape} {t['best int8']:.2f}x" for t in row["threads"].values() if (t["best int8"] or 1) < 1]
    print(f"below 1.0x: {', '.join(below) or 'none'}")


def line(row: Any) -> str:
    """One row for the terminal."""
    parts = [f"{'x'.join(str(row[c]) for c in 'MKN'):16s}"]
    for count, t in row["threads"].items():
        best = f", {t['best int8']:.2f}x torch int8" if t["best int8"] else ""
        real = f", {t['ratio']['torch float32']:.1f}x float" if "torch float32" in t["ratio"] else ""
        parts.append(f"{count} thr {t['us']['fxq']:8.1f} us{best}{real}")
    if "of peak" in row:
        read = f", {row['of bandwidth']:.0%} of read" if row["M"] == 1 else ""
        parts.append(f"{row['of peak']:.0%} of peak{read}")
    return " | ".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs="*", metavar="M", help="K and N 64..4096 for these M, or 1..2048")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if options.grid is not None:
        run_grid(options.grid or sorted({m for m, _, _ in GRID}))
        raise SystemExit
    results = run()
    if options.json:
        options.json.write_text(json.dumps(results))
