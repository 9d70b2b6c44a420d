"""observe: put an observer on every value that `annotate` wants quantized.

Values that share a range feed one observer. An observer passes its input on, so the numbers stay the same bits. Beside
them stands a `Sample` of the calls that they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import call, module_of, place_of
from fxq.observers import HOLDER, OBSERVERS, Edge, Rows, WeightObserver
from fxq.outputs import is_exit
from fxq.pipeline import Context, Numbers, Place
from fxq.qtypes import QuantSpec, RowSpec, SharedSpec, Spec, WeightSpec
from fxq.sampling import SAMPLE, Sample
from fxq.spelling import LINEAR
from fxq.stages import Stage


@dataclass(frozen=True)
class Observe:
    """See the module's docstring."""

    name: str = "observe"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Consumes `ctx.specs`, so a second run finds nothing to do."""
        nodes = {node.name: node for node in gm.graph.nodes}
        if ctx.specs and not hasattr(gm, HOLDER):
            gm.add_module(HOLDER, nn.Module())
            gm.add_module(SAMPLE, Sample())
        owners: dict[str, str] = {}
        products = {node.name for node in gm.graph.nodes if node.target is LINEAR}
        for place, spec in ctx.specs.items():
            value = nodes[place.value]
            readers = [nodes[name] for name in place.readers] if place.readers is not None else list(value.users)
            if isinstance(spec, SharedSpec):
                path = owners[spec.owner]
            else:
                sampled = ctx.recipe.balance or ctx.recipe.round_weights is not None or ctx.recipe.scale_rows
                sampled = sampled and place.readers is not None and products.issuperset(place.readers)
                path = _new(gm, place, value, readers, spec, sampled)
            if place.readers is None:
                owners[place.value] = path
            _insert(gm, value, readers, path, at_edge=place.readers is not None)
        count = len(ctx.specs)
        ctx.specs = {}
        return count


def _insert(gm: GraphModule, value: Node, readers: list[Node], path: str, *, at_edge: bool) -> None:
    """Let `readers` read `value` through the observer at `path`.

    At an edge it stands right before its first reader: an in-place operation in between has then happened.
    """
    first = min(readers, key=lambda node: node._sort_key) if at_edge else None
    with gm.graph.inserting_before(first) if first is not None else gm.graph.inserting_after(value):
        observer = call(gm, path, (value,), value, dtype=value.meta["value"].dtype)
    for reader in readers:
        reader.replace_input_with(value, observer)


def _new(gm: GraphModule, place: Place, value: Node, readers: list[Node], spec: Spec, sampled: bool) -> str:
    """Create the observer of `place`, one that keeps rows of it where asked; returns its path."""
    holder = gm.get_submodule(HOLDER)
    observer: nn.Module
    if isinstance(spec, WeightSpec):
        observer = WeightObserver(f"weight {value.target}", spec.granularity)
    elif isinstance(spec, RowSpec):
        observer = Rows()
    else:
        assert isinstance(spec, QuantSpec)
        if place.readers is None:
            where = f"the output of {place_of(value)}"
        elif value.op == "placeholder":
            where = f"the input {value.target!r}"
        elif is_exit(readers[0]):
            where = f"the output of {place_of(value)}"
        else:
            where = f"the input of {module_of(readers[0]) or place_of(readers[0])}"
        sampled = sampled and spec.observer == "histogram"
        observer = Edge(where) if sampled else OBSERVERS[spec.observer](where)
    name = f"{value.name}_{len(list(holder.children()))}"
    holder.add_module(name, observer)
    return f"{HOLDER}.{name}"


PASS = Observe()
