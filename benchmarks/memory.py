"""Peak memory: running MiniLM-L6 and ResNet-18 in int8 beside float eager, and converting MiniLM-L6.

python -m benchmarks.memory

Each figure is the most memory that a process of its own held at a time (VmHWM), beyond what it held before a model was
loaded, with torch, fxq and the data of calibration in memory. Calls are of 8 x 128 tokens or 8 images, at one thread.
Beyond the weights is what a call takes: activations and whatever it computes in. Converting is also measured beyond
what is held with the float model, which has been called once.
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

WORKLOADS = {workload.name: workload for workload in models.WORKLOADS}
SHAPES = {"MiniLM-L6": (8, 128), "ResNet-18": (8, 3, 224, 224)}
CONVERTED = "MiniLM-L6"
MB = 1e6


def now(key: str) -> float:
    """A line of this process's status in MB: VmRSS, what it holds; VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / MB


def forget_peak() -> None:
    """Let VmHWM begin again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def running(name: str, path: Path, quantized: bool) -> dict[str, float]:
    """Load the model at `path` and call it twice."""
    (inputs,) = WORKLOADS[name].inputs(True, SHAPES[name], 1)
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
    workload = WORKLOADS[CONVERTED]
    calibration = workload.inputs(False, workload.calibrated_on, workload.batches)
    fxq.quantize(torch.nn.Linear(8, 8), torch.zeros(4, 8), on_low_sqnr="ignore")
    start = now("VmRSS")
    model = torch.load(path, weights_only=False)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / MB
    with torch.no_grad():
        model(*calibration[0])  # what the float model needs by itself
    forget_peak()
    before = now("VmRSS")
    fxq.quantize(model, calibration[0], calibration_data=calibration, progress=False)
    return {"parameters": size, "peak": now("VmHWM") - start, "beyond": now("VmHWM") - before}


def child(*arguments: str) -> Any:
    """The result of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, folder: Path) -> Path:
    """Measure both models of one name, each in a child; returns where the float one lies."""
    exact, quantized = folder / f"{name}.pt", folder / f"{name}.fxq"
    workload = WORKLOADS[name]
    model = workload.module()
    torch.save(model, exact)
    calibration = workload.inputs(False, workload.calibrated_on, workload.batches)
    fxq.save(fxq.quantize(model, calibration[0], calibration_data=calibration, progress=False), quantized)
    before = None
    print(f"{name}, {' x '.join(map(str, SHAPES[name])):<20}{'weights':>10}{'a call':>10}{'peak':>10}")
    for kind, path in (("float32 eager", exact), ("int8", quantized)):
        found = child("--measure", kind, "--model", name, "--path", str(path))
        call = found["peak"] - found["loaded"]
        ratio = f"   a call {call / before[0]:.2f}, peak {found['peak'] / before[1]:.2f} of float32" if before else ""
        before = call, found["peak"]
        print(f"{kind:<31}{found['loaded']:7.0f} MB{call:7.0f} MB{found['peak']:7.0f} MB{ratio}", flush=True)
    return exact


def main() -> None:
    """Prepare the models, then measure each in a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("float32 eager", "int8", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SHAPES, help="this one only")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure == "convert":
        print(json.dumps(converting(options.path)))
        return
    if options.measure:
        print(json.dumps(running(options.model, options.path, options.measure == "int8")))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.model] if options.model else SHAPES:
            exact = show(name, Path(folder))
            if name == CONVERTED:
                convert = child("--measure", "convert", "--path", str(exact))
                ratio, size = convert["peak"] / convert["parameters"], convert["parameters"]
                print(
                    f"converting: {convert['peak']:.0f} MB at most, the model included, {ratio:.2f} times the "
                    f"{size:.0f} MB of its parameters; {convert['beyond']:.0f} MB beyond the model that has been "
                    f"called, {convert['beyond'] / size:.2f} times"
                )


if __name__ == "__main__":
    main()
