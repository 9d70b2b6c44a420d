"""fit_products: what calibration data tells of the constants of products, each method product by product, in one run.

The network runs in float and in integers side by side (`fxq.simulation`). At each product the methods change its
constants in their order, and everything behind it sees what it then gives. Where the output of the network loses by all
of it, the last method's changes are taken back, then the one's before.

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
        begun = [(method, fitter) for method in self.methods if (fitter := method.begin(gm, ctx)) is not None]
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
                _undo(method, changes[method], simulation, ctx)
        for method, done in changes.items():
            ctx.report.add_details({name: change.effect for name, change in done.items()})
            if done:
                ctx.report.seconds[method.name] = len(done), seconds[method]
        return sum(map(len, changes.values()))


def _undo(method: Method, changes: dict[str, Change], simulation: Simulation, ctx: Context) -> None:
    loss = f"the output would lose {-simulation.gain:.2f} dB"
    ctx.report.notes.append(f"{method.name}: all {method.what} stay as they were, since {loss}")
    for change in changes.values():
        change.undo()
    changes.clear()
    simulation.judge()
