"""Models that no one here wrote, quantized by default, against float eager; and predicted times beside measured ones.

    make zoo

Each model of tests/zoo is quantized with the default recipe, so that what would be slower in int8 stays float, and runs
in turns with the float model in inference mode, one row, one thread. Then every operation of both graphs is measured in
its place (`fxq.profile`), beside what `fxq.costs` predicts. The networks of `make bench` follow, for the predictions.
Exits with 1 where a quantized model is slower than float by more than `NOISE`, or the median error is `MOST_ERROR`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fxq
from benchmarks.timing import interleave, median_us, ratio
from fxq.inputs import as_call
from fxq.profiling import LEAST

NOISE, MOST_ERROR = 1.05, 0.25
ZOO = Path(__file__).parents[1] / "tests" / "zoo"
ROWS = {"transformers": 4, "vision": 8, "shipped": 16}
"""Rows of a calibration batch of `BATCHES`."""
BATCHES = 3


def zoo(kind: str) -> dict[str, Any]:
    """`MODELS` of one file of tests/zoo: functions that make the model, and inputs of n rows."""
    name = f"zoo_{kind}"
    spec = importlib.util.spec_from_file_location(name, ZOO / f"{kind}_models.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models: dict[str, Any] = module.MODELS
    return models


def bind(model: nn.Module, inputs: Any) -> Callable[[], object]:
    """A call of `model`."""
    call = as_call(inputs)
    return lambda: model(*call.args, **call.kwargs)


def errors(gm: GraphModule, inputs: Any) -> list[float]:
    """|predicted - measured| / measured of the operations of a graph that take `LEAST` and more."""
    timings = [t for t in fxq.profile(gm, inputs).timings if t.measured >= LEAST]
    return [abs(t.predicted - t.measured) / t.measured for t in timings]


def subjects(only: str) -> Iterator[tuple[str, nn.Module, list[Any], Any]]:
    """Name, model, calibration data row by row and one row of every model whose name holds `only`.

    Row by row, since some decide by the number of rows what they compute.
    """
    for kind in ROWS:
        for name, (make, inputs) in zoo(kind).items():
            if only in f"{kind}/{name}":
                torch.manual_seed(1)
                yield f"{kind}/{name}", make().eval(), [inputs(1) for _ in range(ROWS[kind] * BATCHES)], inputs(1)


def run_zoo(only: str, seconds: float) -> tuple[list[str], list[float]]:
    """Print a line for every model; the names of the slower ones, and the errors of all predictions."""
    slower, found = [], []
    for name, model, data, row in subjects(only):
        try:
            qmodel = fxq.quantize(model, row, calibration_data=data, on_low_sqnr="ignore", progress=False)
            times = interleave({"float": bind(model, row), "int8": bind(qmodel, row)}, seconds)
            here = errors(qmodel, row) + errors(fxq.trace(model, row), row)
        except fxq.FxqError as error:
            print(f"{name:58} {type(error).__name__}: {str(error).splitlines()[0][:60]}", flush=True)
            continue
        gain = 1 / ratio(times["int8"], times["float"])
        kept = sum(d.reason is fxq.Reason.UNPROFITABLE for d in qmodel.report.decisions)
        found += here
        if gain < 1 / NOISE:
            slower.append(f"{name} ({gain:.2f}x)")
        off = f"{100 * median(here):3.0f} %" if here else ""
        print(
            f"{name:58} float {median_us(times['float']):9.1f} us  fxq {median_us(times['int8']):9.1f} us  {gain:5.2f}x"
            f"  kept float for time {kept:2d}  predictions off by {off}",
            flush=True,
        )
    return slower, found


def run_workloads(only: str) -> list[float]:
    """The same of the predictions for the networks of `make bench`; the errors of all."""
    from benchmarks.models import WORKLOADS

    found = []
    for workload in (workload for workload in WORKLOADS if only in workload.name):
        model, data = workload.module(), workload.inputs(False, workload.calibrated_on, 2)
        qmodel = fxq.quantize(model, data[0], calibration_data=data, progress=False)
        row = workload.inputs(True, workload.shapes[0], 1)[0]
        int8, floating = errors(qmodel, row), errors(fxq.trace(model, row), row)
        found += int8 + floating
        texts = (f"{100 * median(part):3.0f} % of {len(part)} operations" if part else "-" for part in (int8, floating))
        print(f"{workload.name:58} predictions off by {', '.join(texts)} (int8, float)", flush=True)
    return found


def main() -> int:
    """Print the tables; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the turns of one model")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slower, found = run_zoo(options.only, options.seconds)
        found += run_workloads(options.only)
    print(f"slower than float eager by more than {100 * (NOISE - 1):.0f} %: {', '.join(slower) or 'none'}")
    error = median(found) if found else 0.0
    print(f"predictions are off by {100 * error:.0f} % in the median of {len(found)} operations")
    return int(bool(slower) or error >= MOST_ERROR)


if __name__ == "__main__":
    sys.exit(main())
