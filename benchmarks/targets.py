"""What fxq has set itself, and what a run measured: each target met or missed, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.layers import L2
from fxq.api import MIN_SQNR


@dataclass(frozen=True)
class Target:
    """One target; values that reach `at_least` meet it."""

    text: str
    at_least: float
    found: dict[str, float]
    """Measured, by shape or workload."""

    def __str__(self) -> str:
        met = [name for name, value in self.found.items() if value >= self.at_least]
        worst = min(self.found, key=self.found.__getitem__)
        verdict = "met" if len(met) == len(self.found) else f"met by {len(met)} of {len(self.found)}"
        return f"{self.text}: {verdict}; worst {self.found[worst]:.2f} ({worst})"


def targets(results: Any) -> list[Target]:
    """All targets that the results have a figure for."""
    return [target for target in (*_layers(results), *_avx2(results), *_models(results)) if target.found]


def _layers(results: Any) -> Iterator[Target]:
    rows = {f"{row['M']} x {row['K']} x {row['N']}": row for row in results.get("layers", {}).get("rows", ())}
    operations = {name: 2 * row["M"] * row["K"] * row["N"] for name, row in rows.items()}
    for threads in ("1", "2"):
        found = {name: row["threads"][threads]["best int8"] for name, row in rows.items() if threads in row["threads"]}
        text = (
            f"a layer against the fastest of torch's int8 ops, {threads} thread{'s' * (threads != '1')}, at least 1.0x"
        )
        yield Target(text, 1.0, {name: value for name, value in found.items() if value})
    big = {name for name in rows if operations[name] >= 2 * 16 * 768 * 3072 and rows[name]["M"] >= 16}
    peak = {name: rows[name]["of peak"] for name in rows if name in big and "of peak" in rows[name]}
    yield Target("of the dot-product peak, from 16 x 768 x 3072 up, at least 0.9", 0.9, peak)
    scaling = {name: row["scaling"] for name, row in rows.items() if operations[name] > 1e8 and "scaling" in row}
    yield Target("two threads against one, above 100 MOP, at least 1.8x", 1.8, scaling)
    far = {
        name: row["of bandwidth"]
        for name, row in rows.items()
        if row["M"] == 1 and row["K"] * row["N"] > L2 and "of bandwidth" in row
    }
    yield Target("of the reading bandwidth, one row, weights larger than L2, at least 0.8", 0.8, far)
    small = {name: 2.5 / row["threads"]["1"]["us"]["fxq"] for name, row in rows.items() if name == "1 x 64 x 64"}
    yield Target("2.5 us over the time of a 64 x 64 layer, at least 1.0", 1.0, small)


def _avx2(results: Any) -> Iterator[Target]:
    rows = results.get("layers held to AVX2", {}).get("rows", ())
    found = {f"{row['M']} x {row['K']} x {row['N']}": row["threads"]["1"]["ratio"]["torch float32"] for row in rows}
    yield Target("held to AVX2, a layer against torch float32 held to AVX2 as well, at least 1.3x", 1.3, found)


def _models(results: Any) -> Iterator[Target]:
    rows = {f"{row['model']}, {shape_text(row)}": row for row in results.get("models", {}).get("rows", ())}
    rows = {name: row for name, row in rows.items() if "fxq" in row["sqnr"]}
    for threads in ("1", "2"):
        found = {}
        for name, row in rows.items():
            best = best_peer(row, threads)
            if best and threads in row["threads"]:
                found[name] = row["threads"][threads]["ratio"][best]
        text = f"a model against its fastest peer that is not noise, {threads} thread{'s' * (threads != '1')}"
        yield Target(f"{text}, at least 1.0x", 1.0, found)

    found, batch64 = {}, {}
    for name, row in rows.items():
        result, best = row["threads"]["1"], best_peer(row, "1")
        if row["model"] == "MLP 784-256-128-10" and best:
            if row["shape"][0] == 1:
                found = {"against ORT static int8, half": result["ratio"].get("ORT static int8", 0) / 2}
                found["5 us over its time"] = 5 / result["us"]["fxq"]
            else:
                batch64 = {name: result["ratio"][best]}
    yield Target(
        "MLP 784-256-128-10, batch 1: twice as fast as ORT static int8, and under 5 us, at least 1.0", 1.0, found
    )
    yield Target("the same, batch 64, against its fastest peer, at least 1.5x", 1.5, batch64)


def shape_text(row: Any) -> str:
    """`batch 8` of features, `8 x 128 tokens` of token ids."""
    batch, *rest = row["shape"]
    return f"{batch} x {rest[0]} tokens" if row["cosine"] else f"batch {batch}"


def best_peer(row: Any, threads: str) -> str | None:
    """The fastest peer whose output is not noise (at least `MIN_SQNR` dB); None where there is none."""
    times = row["threads"][threads]["us"]
    honest = [name for name in times if not name.startswith("fxq") and row["sqnr"].get(name, 0) >= MIN_SQNR]
    return min(honest, key=times.__getitem__, default=None)
