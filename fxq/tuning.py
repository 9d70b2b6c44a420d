"""The fastest mix of schemes that keeps the user's own metric.

1. Each layer by itself: what it costs in the metric and gains in time under each scheme, all others float.
2. Every layer takes its fastest scheme: the one by itself, or one for all, if that is faster as a whole, as where
   borders cost each layer more than it gains. Moves to more accurate ones are ordered by metric regained per second
   lost.
3. The fewest moves that keep the metric, by bisection; then each is taken back where the metric allows.

Every mix is measured as a whole before it is believed. Times are predictions from `fxq.costs`, so a run gives the same
result again. A trial costs one quantization and one call of the metric; a file keeps them, so that nothing is lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from tqdm import tqdm

from fxq import __version__
from fxq.api import KeptFloatWarning, prepare, quantize, trace
from fxq.costs import Costs
from fxq.decisions import Decision
from fxq.errors import FileError, InputError, TuningError
from fxq.inputs import as_call
from fxq.inspection import report
from fxq.profiling import predict
from fxq.qtypes import Scheme
from fxq.quantized import QuantizedModule
from fxq.recipe import Recipe, Rule, covers

FLOAT: Scheme = "float"
DEFAULT: tuple[Scheme, ...] = ("w8a8", "w8a8-dynamic", "w8a32")
_ANOTHER = "delete it or name another"
Mix = Mapping[str, Scheme]
"""The scheme of every layer, by module path."""


@dataclass(frozen=True)
class Trial:
    """A mix that was measured: the metric, and the predicted seconds of a call on the examples."""

    mix: dict[str, Scheme]
    metric: float
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """What one layer alone, under one scheme, costs in the metric and gains in seconds, all other layers float."""

    module: str
    scheme: Scheme
    loss: float
    gain: float


@dataclass(frozen=True)
class Tuning:
    """The best mix found, as a model and as a recipe, and everything that was measured on the way.

    metric, seconds: of `model`; float_metric, float_seconds: of the float model; limit: the least metric allowed.
    complete: False where the budget ended the search.
    """

    model: QuantizedModule
    recipe: Recipe
    metric: float
    seconds: float
    float_metric: float
    float_seconds: float
    limit: float
    complete: bool
    sensitivities: list[Sensitivity] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def pareto(self) -> list[Trial]:
        """The trials that no other beats in both time and metric, fastest first."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (t.seconds, -t.metric)):
            if not front or trial.metric > front[-1].metric:
                front.append(trial)
        return front

    def plot(self, path: str | Path) -> Path:
        """All trials, the front, and the limit, as a picture (needs matplotlib)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("a plot needs matplotlib: pip install 'fxq[plots]'") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        front = self.pareto()
        axes.plot([1e6 * t.seconds for t in self.trials], [t.metric for t in self.trials], "o", color="#b9c4d0")
        axes.step([1e6 * t.seconds for t in front], [t.metric for t in front], where="post", color="#1e7a34")
        axes.plot(1e6 * self.float_seconds, self.float_metric, "s", color="#2b5fb0", label="float")
        axes.plot(1e6 * self.seconds, self.metric, "*", color="#1e7a34", markersize=14, label="chosen")
        axes.axhline(self.limit, color="#a86a00", linestyle=":", label="limit")
        axes.set(xlabel="predicted us a call", ylabel="metric")
        axes.legend()
        figure.savefig(Path(path))
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the model left out."""
        plain = {name: getattr(self, name) for name in ("metric", "seconds", "float_metric", "float_seconds", "limit")}
        plain |= {"complete": self.complete, "mix": {name: rule.scheme for name, rule in self.recipe.modules.items()}}
        plain["sensitivities"] = [asdict(s) for s in self.sensitivities]
        return plain | {"trials": [asdict(t) for t in self.trials]}

    def __str__(self) -> str:
        rows = [("module", "scheme", "metric lost", "us gained", "chosen")]
        for s in self.sensitivities:
            rule = self.recipe.modules.get(s.module)
            chosen = "*" if rule is not None and rule.scheme == s.scheme else ""
            rows.append((s.module or "(root)", s.scheme, f"{s.loss:.4g}", f"{1e6 * s.gain:.1f}", chosen))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:4], widths[2:]), row[4]]).rstrip()
            for row in rows
        ]
        state = "" if self.complete else "; the budget ended the search, so there may be better"
        return "\n".join(
            [
                *lines,
                "each by itself, borders included, all other layers float; * is the mix that is chosen",
                f"float: metric {self.float_metric:.6g}, {1e6 * self.float_seconds:.1f} us predicted",
                f"tuned: metric {self.metric:.6g} (limit {self.limit:.6g}), {1e6 * self.seconds:.1f} us predicted, "
                f"{len(self.trials)} trials{state}",
            ]
        )


def tune(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[Any],
    metric: Callable[[nn.Module], float],
    tolerance: float,
    *,
    schemes: tuple[Scheme, ...] = DEFAULT,
    recipe: str | Recipe = "w8a8",
    budget: float | None = None,
    file: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Tuning:
    """The fastest mix of `schemes` and float whose metric is at most `tolerance` below the float model's.

    data: calibration data, as for `quantize`. metric: a function of a model, the higher the better. schemes: what a
    layer may become. recipe: what holds besides; its own rules stay as they are. budget: seconds after which no new
    trial begins. file: where trials are kept as JSON; a run on the same data and metric that finds it goes on from
    there. options: of `quantize`. The result does not depend on how often it was interrupted. Raises `InputError` for a
    tolerance below 0, and `TuningError`, which holds what was found so far, where the metric raises or is not a finite
    number, where float as fxq runs it is below the tolerance, and where the budget ends before anything is found.
    """
    if not isinstance(tolerance, Real) or not tolerance >= 0:
        raise InputError(f"tolerance is {tolerance}; it must be 0 or more: float itself would fail below")
    if not callable(metric):
        raise InputError(f"metric is {metric!r}; it must be a function of a model that returns a number")
    if budget is not None and (not isinstance(budget, Real) or not budget >= 0):
        raise InputError(f"budget is {budget}; it must be seconds, 0 or more, or None")
    if isinstance(schemes, str) or not isinstance(schemes, Collection) or not schemes:
        raise InputError(f"schemes is {schemes!r}; it must be a tuple of the schemes that a layer may become")
    for scheme in schemes:
        Rule(scheme=scheme)
    base = replace(Recipe.of(recipe), judge_costs=False)  # which layers are worth it is what is sought here
    data = list(data) if isinstance(data, Iterator) else data
    run = _Run(model, example_inputs, data, metric, base, options, budget)
    if file is not None:
        run.remember(Path(file), schemes)
    return run.search(tolerance, schemes, progress)


class _ExhaustedError(Exception):
    """The budget is spent."""


class _Run:
    """One search: what does not change in it, and the trials so far."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        data: Iterable[Any],
        metric: Callable[[nn.Module], float],
        base: Recipe,
        options: dict[str, Any],
        budget: float | None,
    ) -> None:
        self.model, self.examples, self.data, self.metric, self.base = model, example_inputs, data, metric, base
        self.options = {"on_low_sqnr": "ignore", "progress": False, **options}
        self.end = math.inf if budget is None else time.monotonic() + budget
        self.costs = Costs()
        self.call = as_call(example_inputs, options.get("example_kwargs"))
        self.trials: dict[str, Trial] = {}
        self.sensitivities: list[Sensitivity] = []
        self.file: Path | None = None
        self.fingerprint = ""
        self.float_metric = self.float_seconds = math.nan
        self.limit = math.nan

    def search(self, tolerance: float, schemes: tuple[Scheme, ...], progress: bool | None) -> Tuning:
        self.float_metric = self._measure(self.model, "the float model")
        names = ("example_kwargs", "leaves", "frontend")
        float_graph = trace(self.model, self.examples, **{k: v for k, v in self.options.items() if k in names})
        self.float_seconds = self._predict(float_graph)
        self.limit = self.float_metric - tolerance
        candidates = self._candidates([scheme for scheme in schemes if scheme != FLOAT])
        if any(trial.mix.keys() != candidates.keys() for trial in self.trials.values()):
            raise FileError(f"{self.file} holds trials of other layers than {', '.join(candidates)}; {_ANOTHER}")
        all_float = dict.fromkeys(candidates, FLOAT)
        complete = True
        with tqdm(desc="tuning", unit="trial", disable=progress is False, delay=2, leave=False) as bar:
            try:
                floating = self.trial(all_float, bar)
                if floating.metric < self.limit:
                    raise TuningError(
                        f"with all layers float the metric is {floating.metric:.6g}, below the limit {self.limit:.6g}: "
                        "fxq's graph may round otherwise than the model; give a larger tolerance"
                    )
                alike = [
                    {layer: scheme if scheme in able else FLOAT for layer, able in candidates.items()}
                    for scheme in dict.fromkeys(scheme for able in candidates.values() for scheme in able)
                ]
                for mix in alike:
                    self.trial(mix, bar)
                bar.total = len(self.trials) + sum(map(len, candidates.values()))
                for layer, able in candidates.items():
                    for scheme in able:
                        alone = self.trial({**all_float, layer: scheme}, bar)
                        loss, gain = floating.metric - alone.metric, floating.seconds - alone.seconds
                        self.sensitivities.append(Sensitivity(layer, scheme, loss, gain))
                self._mix(list(candidates), alike, bar)
            except _ExhaustedError:
                complete = False
        found = self._found(complete)
        if found is None:
            raise TuningError("the budget ended before the first trial that keeps the metric; give it more seconds")
        return found

    def _mix(self, layers: list[str], alike: list[dict[str, Scheme]], bar: Any) -> None:
        """Steps 2 and 3 of the module's docstring. alike: the mixes with one scheme for all layers that can have it."""
        options: dict[str, list[Sensitivity]] = {layer: [Sensitivity(layer, FLOAT, 0.0, 0.0)] for layer in layers}
        for s in self.sensitivities:
            options[s.module].append(s)
        each = {layer: max(options[layer], key=lambda s: s.gain).scheme for layer in layers}
        fastest = min([each, *alike], key=lambda mix: self.trial(mix, bar).seconds)
        start = {layer: next(s for s in options[layer] if s.scheme == fastest[layer]) for layer in layers}
        moves = _moves(start, options)

        def after(count: int) -> dict[str, Scheme]:
            mix = {layer: s.scheme for layer, s in start.items()}
            return mix | {s.module: s.scheme for s in moves[:count]}

        low, high = 0, len(moves)  # all moves lead to float, which keeps the metric
        while low < high:
            middle = (low + high) // 2
            if self.trial(after(middle), bar).metric >= self.limit:
                high = middle
            else:
                low = middle + 1
        mix = after(high)
        for layer in [s.module for s in moves[:high]]:
            for s in [start[layer], *sorted(options[layer], key=lambda s: -s.gain)]:
                if s.scheme == mix[layer]:
                    break
                if self.trial({**mix, layer: s.scheme}, bar).metric >= self.limit:
                    mix = {**mix, layer: s.scheme}
                    break

    def trial(self, mix: dict[str, Scheme], bar: Any) -> Trial:
        """Quantize with this mix and measure it, unless that has been done."""
        key = json.dumps(mix, sort_keys=True)
        if key not in self.trials:
            if time.monotonic() >= self.end:
                raise _ExhaustedError
            qmodel = self._quantize(mix)
            value = self._measure(qmodel, f"the mix {mix}")
            self.trials[key] = Trial(mix, value, self._predict(qmodel))
            self._write()
            bar.update()
        return self.trials[key]

    def _candidates(self, schemes: list[Scheme]) -> dict[str, list[Scheme]]:
        """The schemes that each module's products can run in, in graph order; not where the base has one for it."""
        settled = [name for name, rule in self.base.modules.items() if rule.scheme is not None]
        products = {
            scheme: [
                d
                for d in self._decisions(scheme)
                if (d.macs or d.op.startswith("embedding")) and not any(covers(path, d.module) for path in settled)
            ]
            for scheme in schemes
        }
        able = {scheme: {d.module for d in found if d.scheme == scheme} for scheme, found in products.items()}
        paths = dict.fromkeys(decision.module for found in products.values() for decision in found)
        layers = {path: [scheme for scheme in schemes if path in able[scheme]] for path in paths}
        if not any(layers.values()):
            raise InputError(f"there is nothing to tune: no product can run as {' or '.join(schemes)}; see fxq.report")
        return {path: layers[path] for path in paths if layers[path]}

    def _decisions(self, scheme: Scheme) -> list[Decision]:
        names = ("example_kwargs", "families", "leaves", "frontend", "progress")
        options = {name: value for name, value in self.options.items() if name in names}
        recipe = replace(self.base, scheme=scheme)
        return report(prepare(self.model, self.examples, recipe=recipe, **options)).decisions

    def _recipe(self, mix: Mix) -> Recipe:
        """Rules for a module before those for what is in it, and the base's own behind them: the last given wins."""
        outer_first = sorted(mix, key=lambda path: path.count(".") + bool(path))
        rules = {layer: Rule(scheme=mix[layer]) for layer in outer_first}
        return replace(
            self.base, modules={**rules, **{n: r.over(rules.get(n, r)) for n, r in self.base.modules.items()}}
        )

    def _quantize(self, mix: Mix) -> QuantizedModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeptFloatWarning)
            return quantize(
                self.model, self.examples, calibration_data=self.data, recipe=self._recipe(mix), **self.options
            )

    def _measure(self, model: nn.Module, what: str) -> float:
        try:
            value = float(self.metric(model))
        except Exception as error:
            message = f"the metric raises {type(error).__name__} on {what}: {error}"
            raise TuningError(message, self._found(complete=False)) from error
        if not math.isfinite(value):
            message = f"the metric is {value} on {what}; it must be a finite number"
            raise TuningError(message, self._found(complete=False))
        return value

    def _predict(self, gm: GraphModule) -> float:
        seconds = sum(predict(gm, self.call, self.costs).values())
        self.costs.save()  # a run that goes on from the file of trials predicts by the same
        return seconds

    def _found(self, complete: bool) -> Tuning | None:
        """The best of the trials so far; None where none keeps the metric."""
        kept = [trial for trial in self.trials.values() if trial.metric >= self.limit]
        if not kept:
            return None
        best = min(kept, key=lambda t: (t.seconds, -t.metric, json.dumps(t.mix, sort_keys=True)))
        return Tuning(
            self._quantize(best.mix),
            self._recipe(best.mix),
            best.metric,
            best.seconds,
            self.float_metric,
            self.float_seconds,
            self.limit,
            complete,
            self.sensitivities,
            list(self.trials.values()),
        )

    def remember(self, file: Path, schemes: tuple[Scheme, ...]) -> None:
        """Keep trials in `file`, and take those that a run on the same model has left there."""
        capture = [(name, self.options.get(name)) for name in ("leaves", "frontend")]
        digest = hashlib.sha256(repr((__version__, self.model, self.base, schemes, capture)).encode())
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            digest.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in self.call.tensors():
            digest.update(name.encode() + repr((tensor.dtype, tensor.shape)).encode())
        self.file, self.fingerprint = file, digest.hexdigest()[:16]
        if not file.exists():
            self._write()
            return
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
            known, trials = plain["fingerprint"], [_trial(**entry) for entry in plain["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{file} is not a file of trials ({error}); {_ANOTHER}") from error
        if known != self.fingerprint:
            raise FileError(f"{file} belongs to another model, recipe or version of fxq; {_ANOTHER}")
        self.trials = {json.dumps(trial.mix, sort_keys=True): trial for trial in trials}

    def _write(self) -> None:
        if self.file is None:
            return
        plain = {"fingerprint": self.fingerprint, "trials": [asdict(trial) for trial in self.trials.values()]}
        part = self.file.with_name(f"{self.file.name}.part")  # whatever interrupts it, the file itself is whole
        try:
            part.write_text(json.dumps(plain, indent=1), encoding="utf-8")
            part.replace(self.file)
        except OSError as error:
            raise FileError(f"cannot write the trials to {self.file}: {error}") from error


def _trial(mix: dict[str, Scheme], metric: float, seconds: float) -> Trial:
    """One out of a file. Raises TypeError and ValueError where it is none."""
    trial = Trial(dict(mix), float(metric), float(seconds))
    if not (math.isfinite(trial.metric) and math.isfinite(trial.seconds) and trial.seconds >= 0):
        raise ValueError(f"a metric of {metric} in {seconds} seconds")
    return trial


def _moves(start: Mapping[str, Sensitivity], options: Mapping[str, list[Sensitivity]]) -> list[Sensitivity]:
    """Single steps from the fastest mix to all float, the most metric regained per second lost first."""
    now = dict(start)
    moves: list[Sensitivity] = []
    while True:
        steps = []
        for layer, current in now.items():
            for s in options[layer]:
                slower = current.gain - s.gain
                if s.scheme != current.scheme and (s.loss < current.loss or s.scheme == FLOAT):
                    regained = current.loss - s.loss
                    steps.append((regained / max(slower, 1e-9), regained, s))
        if not steps:
            return moves
        _, _, best = max(steps, key=lambda step: step[:2])
        now[best.module] = best
        moves.append(best)
