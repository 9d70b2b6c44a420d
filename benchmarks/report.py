"""Results as tables and a plot: benchmarks/results/ and the part of README.md between its `bench` markers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.recipes import cells
from benchmarks.targets import best_peer, shape_text, targets
from fxq.api import MIN_SQNR

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a markdown table."""
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def machine_text(results: Any) -> str:
    """Where and when, in a line."""
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    load = f"load average {m['load before']} before and {m['load after']} after"
    return f"{m['cpu']} ({m['cores']} cores, {m['isa']}), {m['date']}, {load}. {versions}."


def markdown(results: Any) -> str:
    """The whole report."""
    text = ["# Benchmark results", "", machine_text(results), ""]
    text += ["Median microseconds, all contestants in turns in one process; see benchmarks/timing.py.", ""]
    if "models" in results:
        text += _models(results["models"]["rows"])
    if "recipes" in results:
        text += ["## Recipes: linear, relu, linear of 1024 channels, beside torch in the same float type", ""]
        text += [*_recipes(results["recipes"]["rows"]), ""]
    if "layers" in results:
        text += ["## Layers: uint8 in, uint8 out, relu", "", *_layers(results["layers"]), ""]
    if "layers held to AVX2" in results:
        text += ["## The same, fxq and torch both held to AVX2", ""]
        text += [f"How: {results['held']}.", "", *_layers(results["layers held to AVX2"]), ""]
    text += ["## Targets", "", *(f"- {target}" for target in targets(results)), ""]
    return "\n".join(text)


def _models(rows: list[Any]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in (*row["sqnr"], *row["failed"])))
    peers = [name for name in names if name != "torch float32"]  # which is what the others are held against
    for threads in rows[0]["threads"]:
        yield from (f"## Models, {threads} thread{'s' * (threads != '1')}, us", "")
        yield from table(["workload", *names], (_times(row, names, threads) for row in rows))
        yield ""
    yield from ("## SQNR in dB against float32, held-out inputs", "")
    yield from table(
        ["workload", *peers], ([_name(row), *(f"{row['sqnr'].get(name, '')}" for name in peers)] for row in rows)
    )
    yield ""
    embedding = [row for row in rows if row["cosine"]]
    if embedding:
        yield from ("## Mean cosine to the float32 embedding of a row of tokens", "")
        lines = ([_name(row), *(f"{row['cosine'].get(name, '')}" for name in peers)] for row in embedding)
        yield from table(["workload", *peers], lines)
        yield ""
    failures = dict.fromkeys(f"{row['model']}, {name}: {why}" for row in rows for name, why in row["failed"].items())
    if failures:
        yield from ("## Failed", "", *(f"- {line}" for line in failures), "")


def _name(row: Any) -> str:
    return f"{row['model']}, {shape_text(row)}"


def _times(row: Any, names: list[str], threads: str) -> list[str]:
    times = row["threads"][threads]["us"]
    best = min((name for name in ("fxq", best_peer(row, threads)) if name in times), key=times.__getitem__)
    cells = [_us(times[name]) if name in times else "failed" for name in names]
    return [_name(row), *(f"**{cell}**" if name == best else cell for name, cell in zip(names, cells, strict=True))]


def _recipes(rows: list[Any]) -> Iterator[str]:
    header = ["recipe", "activations", "rows"]
    for count in rows[0]["threads"]:
        header += [f"us, {count} thr", "float us", "faster"]
    yield from table(header, map(cells, rows))


def _layers(layers: Any) -> Iterator[str]:
    counts = list(layers["rows"][0]["threads"])
    header = ["M, K, N"]
    for count in counts:
        header += [f"us, {count} thr", "GOPS", "x torch int8", "x torch float32"]
    header += ["two threads", "of peak", "of read"]

    def cells(row: Any) -> Iterator[str]:
        yield f"{row['M']}, {row['K']}, {row['N']}"
        for count in counts:
            result = row["threads"][count]
            yield from (_us(result["us"]["fxq"]), f"{result['gops']:.0f}")
            best = result["best int8"]
            yield from (f"{best:.2f}" if best else "", f"{result['ratio'].get('torch float32', 0):.1f}")
        yield f"{row['scaling']:.2f}x" if "scaling" in row else ""
        yield f"{row['of peak']:.0%}" if "of peak" in row else ""
        yield f"{row['of bandwidth']:.0%}" if "of bandwidth" in row and row["M"] == 1 else ""

    yield from table(header, map(cells, layers["rows"]))
    notes: dict[str, dict[str, None]] = {}
    for row in layers["rows"]:
        for name, note in row["notes"].items():
            notes.setdefault(name, {})[note] = None
    yield ""
    yield f"Probes: {layers['probes']}. Held against exact arithmetic before timing:"
    yield from (f"{name}: {'; '.join(list(found)[:4])}." for name, found in notes.items())


def snippet(results: Any) -> str:
    """The table for README: fxq, its fastest peer whose output is not noise, and the best known ones."""
    shown = ("torch float32", "ORT static int8", "OpenVINO NNCF int8")
    lines = []
    for row in results["models"]["rows"]:
        if "fxq" not in row["sqnr"]:
            continue
        for threads, result in row["threads"].items():
            best = best_peer(row, threads)
            cells = [_name(row), threads, f"**{_time(result['us']['fxq'])}** ({row['sqnr']['fxq']:.0f} dB)"]
            for name in shown:
                known = name in result["us"]
                noise = f" ({row['sqnr'][name]:.0f} dB)" if known and name != "torch float32" else ""
                cells.append(f"{_time(result['us'][name])}{noise}" if known else "failed")
            cells.append(f"{best}: {result['ratio'][best]:.2f}x" if best else "")
            lines.append(cells)
    header = ["workload", "threads", "fxq", *shown, "the fastest peer takes"]
    return "\n".join([*table(header, lines), "", machine_text(results)])


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def insert(text: str, readme: Path) -> bool:
    """Replace what stands between the markers; False where the file has none."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return False
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return True


def plot(results: Any, path: Path) -> None:
    """How many times faster than torch float32, every contestant on every workload, one panel per number of threads."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = results["models"]["rows"]
    counts = list(rows[0]["threads"])
    figure, panels = pyplot.subplots(
        1,
        len(counts),
        figsize=(11, 1.4 + 0.45 * len(rows)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = [name for name in dict.fromkeys(n for row in rows for n in row["sqnr"]) if name != "torch float32"]
    styles = {name: (f"C{i}", "osD^v<>PXh"[i % 10]) for i, name in enumerate(name for name in names if name != "fxq")}
    for panel, threads in zip(panels[0], counts, strict=True):
        for name in [*(n for n in names if n != "fxq"), "fxq"]:
            color, marker = styles.get(name, ("black", "*"))
            for y, row in enumerate(rows):
                us = row["threads"][threads]["us"]
                if name not in us:
                    continue
                noise = row["sqnr"][name] < MIN_SQNR
                panel.plot(
                    us["torch float32"] / us[name],
                    -y,
                    marker,
                    color=color,
                    markersize=14 if name == "fxq" else 7,
                    markerfacecolor="none" if noise else color,
                    label=name if y == 0 else None,
                )
        panel.set(title=f"{threads} thread{'s' * (threads != '1')}", xscale="log", xlabel="times torch float32")
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.grid(alpha=0.3, which="both", axis="x")
        panel.set_yticks([-y for y in range(len(rows))], [_name(row) for row in rows])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Speed on one machine, one run; hollow: less than {MIN_SQNR:.0f} dB, that is noise", fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)
