"""fxq beside its peers: layers, models and recipes in one run, into benchmarks/results/ and README's table.

make bench                          the default, some six minutes
python -m benchmarks.run --full     the grid of layers, every peer, more rounds; some half an hour
python -m benchmarks.run --report   tables, plot and README again from the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import layers, models, recipes, report
from fxq import __version__, kernels

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "torchao", "transformers")
HELD_TO_AVX2 = {
    "FXQ_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    info = kernels.info()
    versions = {"fxq": __version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "cpu": info.cpu,
        "cores": os.cpu_count(),
        "isa": info.isa,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "load before": _load(),
    }


def _load() -> float:
    """How many processes wanted to run in the last minute: below 1 the machine was quiet."""
    return round(os.getloadavg()[0], 1)


def held_to_avx2() -> Any:
    """The layer benchmark in a process of its own, whose environment keeps fxq and torch from anything above AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "avx2.json"
        command = [sys.executable, "-m", "benchmarks.layers", "--json", str(path)]
        subprocess.run(command, cwd=ROOT, env=os.environ | HELD_TO_AVX2, check=True)
        return json.loads(path.read_text())


def measure(full: bool) -> dict[str, Any]:
    """Run everything; what comes back is what the JSON file holds."""
    if _load() > 0.5:
        print(
            f"load average {_load()}: others use this machine, and what needs all its threads suffers most", flush=True
        )
    results: dict[str, Any] = {"machine": machine(), "held": " ".join(f"{k}={v}" for k, v in HELD_TO_AVX2.items())}
    print("models", flush=True)
    results["models"] = models.run(full, seconds=15.0 if full else 5.0)
    print("recipes", flush=True)
    results["recipes"] = recipes.run()
    print("layers", flush=True)
    results["layers"] = layers.run(layers.SHAPES + layers.GRID if full else layers.SHAPES, seconds=1.5)
    if "avx2" in kernels.info().available:
        print("layers, held to AVX2", flush=True)
        results["layers held to AVX2"] = held_to_avx2()
    results["machine"]["load after"] = _load()
    return results


def publish(results: Any, folder: Path, readme: Path) -> None:
    """Write the tables, the plot and README's part."""
    (folder / "bench.md").write_text(report.markdown(results))
    text = report.snippet(results)
    report.plot(results, folder / "bench.svg")
    if not report.insert(text, readme):
        print(f"{readme} has no markers {report.BEGIN} and {report.END}: left as it is")


def main() -> None:
    """Measure, write, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the grid of layers, every peer, more rounds")
    parser.add_argument("--report", action="store_true", help="measure nothing: write again from the last results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file whose table is replaced")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, start = options.out / "bench.json", time.monotonic()
    if not options.report:
        path.write_text(json.dumps(measure(options.full), indent=1) + "\n")
    publish(json.loads(path.read_text()), options.out, options.readme)
    print(f"{path.with_suffix('.md')}, after {(time.monotonic() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
