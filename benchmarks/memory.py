"""Peak memory of MiniLM-L6: converting it beside the float model, and running it beside float eager.

python -m benchmarks.memory

Each figure is the most memory that a process of its own held at a time (VmHWM), beyond what it held before: before a
model was loaded for running, with the model and its calibration data in memory for converting. Calls are of 8 x 128
tokens, at one thread. The float model is loaded the same way for both, from one file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fxq
from benchmarks import models

WORKLOAD = next(workload for workload in models.WORKLOADS if workload.name == "MiniLM-L6")
MB = 1e6


def now(key: str) -> float:
    """A line of this process's status in MB: VmRSS, what it holds; VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / MB


def forget_peak() -> None:
    """Let VmHWM begin again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def running(path: Path, quantized: bool) -> dict[str, float]:
    """Load the model at `path` and call it twice."""
    (inputs,) = WORKLOAD.inputs(True, (8, 128), 1)
    warm = torch.nn.Linear(8, 8)
    with torch.inference_mode():
        warm(torch.zeros(1, 8))
        fxq.quantize(warm, torch.zeros(4, 8), on_low_sqnr="ignore")(torch.zeros(1, 8))  # libraries are no part of it
        forget_peak()
        before = now("VmRSS")
        model = fxq.load(path) if quantized else torch.load(path, weights_only=False)
        loaded = now("VmRSS")
        for _ in range(2):
            model(*inputs)
    return {"loaded": loaded - before, "peak": now("VmHWM") - before}


def converting(path: Path) -> dict[str, float]:
    """Quantize the float model at `path`."""
    calibration = WORKLOAD.inputs(False, WORKLOAD.calibrated_on, WORKLOAD.batches)
    fxq.quantize(torch.nn.Linear(8, 8), torch.zeros(4, 8), on_low_sqnr="ignore")
    start = now("VmRSS")
    model = torch.load(path, weights_only=False)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / MB
    with torch.no_grad():
        model(*calibration[0])  # what the float model needs by itself
    forget_peak()
    before = now("VmRSS")
    fxq.quantize(model, calibration[0], calibration_data=calibration, progress=False)
    return {"parameters": size, "loaded": before - start, "peak": now("VmHWM") - start}


def child(*arguments: str) -> Any:
    """The result of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prepare both models, then measure each in a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("float", "int8", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure == "convert":
        print(json.dumps(converting(options.path)))
        return
    if options.measure:
        print(json.dumps(running(options.path, options.measure == "int8")))
        return
    with tempfile.TemporaryDirectory() as folder:
        exact, quantized = Path(folder) / "model.pt", Path(folder) / "model.fxq"
        model = WORKLOAD.module()
        torch.save(model, exact)
        calibration = WORKLOAD.inputs(False, WORKLOAD.calibrated_on, WORKLOAD.batches)
        fxq.save(fxq.quantize(model, calibration[0], calibration_data=calibration), quantized)
        float_run = child("--measure", "float", "--path", str(exact))
        int8_run = child("--measure", "int8", "--path", str(quantized))
        convert = child("--measure", "convert", "--path", str(exact))
    print(f"{'MiniLM-L6, 8 x 128 tokens':<28}{'loaded':>10}{'peak':>10}")
    print(f"{'float32 eager':<28}{float_run['loaded']:7.0f} MB{float_run['peak']:7.0f} MB")
    ratio = int8_run["peak"] / float_run["peak"]
    print(f"{'int8':<28}{int8_run['loaded']:7.0f} MB{int8_run['peak']:7.0f} MB   {ratio:.2f} of float32")
    ratio = convert["peak"] / convert["parameters"]
    size = convert["parameters"]
    print(f"converting: {convert['peak']:.0f} MB at most, {ratio:.2f} times the {size:.0f} MB of parameters")


if __name__ == "__main__":
    main()
