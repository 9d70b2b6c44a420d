"""fit_products: what calibration data tells of the constants of products, each method product by product, in one run.

The network runs in float and in integers side by side (`fxq.simulation`). At each product the methods change its
constants in their order, and everything behind it sees what it then gives. Where the output of the network loses by all
of it, the last method's changes are taken back, then the one's before; and where none are left, the network runs once
more without the first method, since the others were fitted to what it had made of the products.

The methods have files of their own: `round_weights`, `correct_bias`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.pipeline import Context, Numbers
from fxq.simulation import Change, Method, Simulation
from fxq.stages import Stage


@dataclass(frozen=True)
class FitProducts:
    """See the module's docstring. methods: in the order in which they come to a product."""

    methods: tuple[Method, ...]
    name: str = "fit-products"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of constants changed; effects and times go into the report."""
        refused: dict[str, str] = {}
        count = 0
        for first, method in enumerate(self.methods):
            count = _fit(self.methods[first:], gm, ctx, refused)
            if count or method.name not in refused:  # without it, the others would do the same again
                break
        ctx.report.notes += refused.values()
        return count


def _fit(methods: tuple[Method, ...], gm: GraphModule, ctx: Context, refused: dict[str, str]) -> int:
    """One run of the network with these methods; the number of constants changed. refused: why, by name of a method."""
    begun = [(method, fitter) for method in methods if (fitter := method.begin(gm, ctx)) is not None]
    products = set[Node]().union(*(fitter.products for _, fitter in begun))
    if not products:
        return 0
    simulation = Simulation(gm, ctx)
    changes: dict[Method, dict[str, Change]] = {method: {} for method, _ in begun}
    seconds = dict.fromkeys(changes, 0.0)
    for node in simulation.stops(products, f"fitting {' and '.join(method.what for method in changes)}"):
        for method, fitter in begun:
            start = time.perf_counter()
            change = fitter.fit(node, simulation) if node in fitter.products else None
            if change is not None:
                changes[method][node.name] = change
                simulation.rerun(node)
            seconds[method] += time.perf_counter() - start
    for method in reversed(changes):
        if simulation.gain >= 0:
            break
        if changes[method]:
            loss = f"the output would lose {-simulation.gain:.2f} dB"
            refused[method.name] = f"{method.name}: all {method.what} stay as they were, since {loss}"
            _undo(changes[method], simulation)
    for method, done in changes.items():
        ctx.report.add_details({name: change.effect for name, change in done.items()})
        if done:
            refused.pop(method.name, None)
            ctx.report.seconds[method.name] = len(done), seconds[method]
    return sum(map(len, changes.values()))


def _undo(changes: dict[str, Change], simulation: Simulation) -> None:
    for change in changes.values():
        change.undo()
    changes.clear()
    simulation.judge()
