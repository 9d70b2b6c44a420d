"""What would help the layers that cost most: each remedy is tried on the whole model, and the best can be pasted.

The suspects are the modules without whose own noise the output gains most (`fxq.effects`). For each, the model is
quantized anew with one rule more: float first, and where the output gains by that or would gain without the noise,
since float takes in what others round, another observer, weights with a scale per channel, or rows that find their
scales as they run. What counts is the output's SQNR.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from tqdm import tqdm

from fxq.comparison import CANDIDATES, EQUAL, Comparison, Remedy, Suspect
from fxq.decisions import Report
from fxq.observers import OBSERVERS
from fxq.recipe import FLOAT, Recipe, Rule

COUNT = 3


def find_remedies(
    comparison: Comparison,
    report: Report,
    recipe: Recipe,
    effects: Callable[[Iterable[str]], Mapping[str, float]],
    attempt: Callable[[Recipe], float],
    seconds: float,
    progress: bool | None = None,
) -> list[Suspect]:
    """The `COUNT` most suspect modules, with what was tried for each.

    report, recipe: of the model compared. effects: the output's SQNR in dB without the own noise of each of these
    modules; none for what is inside of leaves, which comes last, the noisiest first. attempt: quantizes with a recipe
    and returns the output's SQNR in dB. seconds: after which no further one begins; the first remedies of all suspects
    come before the second ones. Float is the last of those tried, so that of remedies as good the model keeps more in
    int8.
    """
    linears = {d.module for d in report.decisions if d.op == "linear"}
    losses: dict[str, float] = {}
    for layer in comparison.worst(len(comparison.layers)):
        if any(d.module == layer.module and d.module and d.form == "int8" for d in report.decisions):
            losses.setdefault(layer.module, layer.alone)
    without = effects(list(losses)[:CANDIDATES])
    modules = sorted(losses, key=lambda module: -without.get(module, -math.inf))[:COUNT]
    tried: dict[str, list[Remedy]] = {module: [] for module in modules}
    end = time.monotonic() + seconds

    def run(turns: list[tuple[str, Rule]]) -> None:
        for module, rule in tqdm(turns, "trying remedies", disable=progress is False, delay=2, leave=False):
            if time.monotonic() < end:
                given = dict(recipe.modules)
                own = given.pop(module, Rule())  # the last given wins
                changed = replace(recipe, modules={**given, module: rule.over(own)})
                tried[module].append(Remedy(changed.code, attempt(changed)))

    run([(module, FLOAT) for module in modules])
    floats = {module: remedies.pop() for module, remedies in tried.items() if remedies}
    reachable = {module: max(remedy.output, without.get(module, -math.inf)) for module, remedy in floats.items()}
    curable = [module for module in floats if reachable[module] > comparison.output + EQUAL]
    rules = {m: list(_rules(recipe.rule_for(m, "linear" if m in linears else ""), m in linears)) for m in curable}
    longest = max(map(len, rules.values()), default=0)
    run([(m, rules[m][i]) for i in range(longest) for m in curable if i < len(rules[m])])
    for module, remedy in floats.items():
        tried[module].append(remedy)
    return [Suspect(m, losses[m], comparison.output, without.get(m), tuple(tried[m])) for m in modules]


def _rules(now: Rule, linear: bool) -> Iterator[Rule]:
    """What may help a module that is quantized by `now`, but for float."""
    if now.scheme == "w8a8":
        yield from (Rule(observer=name) for name in OBSERVERS if name not in (now.observer, "moving_average"))
    if now.weight == "per_tensor":
        yield Rule(weight="per_channel")
    if linear and now.scheme == "w8a8":
        yield Rule(scheme="w8a8-dynamic")
