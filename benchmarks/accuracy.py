"""Which methods and which observer should be the default? SQNR on unseen inputs with each of them on and off.

    make accuracy                           every workload of `make bench` on one thread, some ten minutes
    python -m benchmarks.accuracy --only X  those whose name holds X, and of them what is not in the results yet

Each model is prepared and calibrated once for an observer, and converted with each recipe. What it gives is compared
with the float model on inputs that it has not seen. Writes benchmarks/results/accuracy.json and the tables in
docs/accuracy.md, where the best static int8 peer comes from the results of `make bench`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fxq
from benchmarks.models import WORKLOADS, Workload
from benchmarks.peers import to_tensor
from fxq.comparison import sqnr
from fxq.pipeline import Context

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "accuracy.json"
BENCH = Path(__file__).parent / "results" / "bench.json"
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
PEERS = ("torch.ao static", "ORT static int8", "OpenVINO NNCF int8")

DEFAULT = fxq.Recipe(judge_costs=False)
"""Without choices by time: accuracy alone is measured."""
NONE = replace(DEFAULT, balance=False, scale_rows=False, round_weights=None, correct_bias=None)
METHODS = {
    "the default": DEFAULT,
    "with equalize": replace(DEFAULT, equalize=True),
    "without balance": replace(DEFAULT, balance=False),
    "without scale_rows": replace(DEFAULT, scale_rows=False),
    "without round_weights": replace(DEFAULT, round_weights=None),
    "round_weights adaround": replace(DEFAULT, round_weights="adaround"),
    "without correct_bias": replace(DEFAULT, correct_bias=None),
    "correct_bias analytic": replace(DEFAULT, correct_bias="analytic"),
    "none of them": NONE,
}
OBSERVERS = ("min_max", "moving_average", "percentile")
TIMED = ("balance", "scale-rows", "equalize", "round-weights", "adaround", "correct-bias")


def measure(workload: Workload, found: dict[str, Any]) -> Iterator[None]:
    """Fill `found`, a step for each recipe that it has not: SQNR in dB; seconds of the methods, the products."""
    module, data = workload.module(), workload.inputs(False, workload.calibrated_on, workload.batches)
    held_out = workload.inputs(True, workload.calibrated_on, max(2, workload.rows // workload.calibrated_on[0]))
    with torch.no_grad():
        expected = torch.cat([module(*inputs) for inputs in held_out])
    for observer in ("histogram", *OBSERVERS):
        recipes = METHODS if observer == "histogram" else {f"observer {observer}": replace(DEFAULT, observer=observer)}
        missing = {name: recipe for name, recipe in recipes.items() if name not in found["sqnr"]}
        if not missing:
            continue
        prepared = fxq.prepare(module, data[0], recipe=replace(DEFAULT, observer=observer))
        fxq.calibrate(prepared, data, progress=False)
        for name, recipe in missing.items():
            context: Context = prepared.meta["fxq"]
            context.recipe = recipe
            qmodel = fxq.convert(prepared)
            with torch.no_grad():
                actual = torch.cat([to_tensor(qmodel(*inputs)) for inputs in held_out])
            found["sqnr"][name] = round(sqnr(expected, actual), 2)
            found["products"] = sum(d.macs > 0 and d.form == "int8" for d in qmodel.report.decisions)
            took = dict(qmodel.report.seconds)
            if recipe.round_weights == "adaround" and "round-weights" in took:
                took["adaround"] = took.pop("round-weights")
            for step in TIMED:  # the longest time: of a recipe that has it
                _, seconds = took.get(step, (0, 0.0))
                found["seconds"][step] = max(found["seconds"].get(step, 0.0), round(seconds, 2))
            print(f"    {workload.name}: {name} {found['sqnr'][name]:.2f} dB", flush=True)
            yield


def best_peers() -> dict[str, float]:
    """The best SQNR of a static int8 peer, by workload, over the sizes that were measured."""
    best: dict[str, float] = defaultdict(lambda: float("-inf"))
    for row in json.loads(BENCH.read_text())["models"]["rows"]:
        reached = [row["sqnr"][name] for name in PEERS if name in row["sqnr"]]
        best[row["model"]] = max([best[row["model"]], *reached])
    return best


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Lines of markdown: SQNR by recipe and workload, then what the methods take."""
    names = [workload.name for workload in WORKLOADS if workload.name in results]
    peers = best_peers()
    yield f"| SQNR, dB | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for recipe in (*METHODS, *(f"observer {observer}" for observer in OBSERVERS)):
        values = [results[name]["sqnr"].get(recipe) for name in names]
        yield f"| {recipe} | {' | '.join('' if value is None else f'{value:.1f}' for value in values)} |"
    known = [f"{peers[name]:.1f}" if name in peers else "" for name in names]
    yield f"| best static int8 peer | {' | '.join(known)} |"
    yield ""
    yield f"| ms per product | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for step in TIMED:
        times = [(results[name]["seconds"].get(step), results[name]["products"]) for name in names]
        cells = ("" if seconds is None else f"{1000 * seconds / count:.0f}" for seconds, count in times)
        yield f"| {step.replace('-', '_')} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, write, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if only and RESULTS.exists() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for workload in WORKLOADS:
            if only in workload.name:
                found = results.setdefault(workload.name, {"sqnr": {}, "seconds": {}, "products": 1})
                for _ in measure(workload, found):
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = PAGE.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text("\n".join([f"{head}{BEGIN}", *tables(results), tail]))
    print(PAGE)


if __name__ == "__main__":
    main()
