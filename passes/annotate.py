"""annotate: decide for every value whether it becomes an integer, and record for every operation why or why not.

1. Each op family claims its operations: products (linear), pointwise (add), carries (reshape, cat, relu, max-pool).
2. Carries tie values together: connected values form a group that shares one scale and zero point. Not so a value that
   is concatenated and that others read as well: it keeps a range of its own, as does the concatenation.
3. A group is integer when some integer operation produces a value of it and only integer operations read it. Its values
   get one range, observed wherever a producer writes it.
4. In any other group the values stay float, and each product that reads one quantizes it at its own edge. A product
   then writes float32 (its epilogue does), which is both cheaper and closer than writing and reading integers.
5. A pointwise operation is worth it only between integers: in an integer group, with an operand from one. Otherwise it
   stays float, and 2 to 4 are decided again without it. A function of one tensor (`fxq.ops.lookup`) is one operation,
   however many it is written with; where its result stays float, it reads integers if others want them.
   What the model returns is read in float, or, under `Recipe(outputs="uint8")`, as integers.

6. A product of another scheme than "w8a8" reads and writes float: its rows are quantized as it runs
   ("w8a8-dynamic"), or its weight alone is int8 ("w8a32", "w8a16").

A product and a clamp that only it feeds count as one (the longest pattern wins), so no observer stands between them. So
do a linear or convolution and an activation of `fxq.ops.activation`, where something else than products reads the
activation; where only products read, each quantizes at its own edge, and the epilogue writes what they want. Where a
table is faster, and the operations that read it take integers, it is one.
Nothing in the graph changes: the specs are in the context, the decisions in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq.decisions import Decision, Form, Reason
from fxq.errors import CalibrationError, QuantizationError
from fxq.family import Claim, Refusal
from fxq.graph import Value, is_call, is_float_tensor, line_of, module_of, place_of, target_name
from fxq.macs import count_macs
from fxq.ops.activation import activation_of
from fxq.outputs import is_exit
from fxq.pipeline import Context, Numbers, Place
from fxq.qtypes import QuantSpec, RowSpec, Scheme, SharedSpec, WeightSpec
from fxq.spelling import CAT, CONVS, LINEAR, float_bounds
from fxq.stages import Stage

_PAYS = 4096
"""Numbers of an example from which on looking them up takes less time than a call of an operation."""


@dataclass
class Plan:
    """What is known of a graph while it is decided: claims, their schemes and refusals by node, swallowed clamps.

    integer_outputs: the graph's output reads integers. inner: the operations that count as one with another, which is
    the last of them. to_float: operations that read integers where others do, and write float32. untied: pairs of a
    value and a concatenation that does not share its range.
    """

    claims: dict[Node, Claim] = field(default_factory=dict)
    schemes: dict[Node, Scheme] = field(default_factory=dict)
    families: dict[Node, str] = field(default_factory=dict)
    refusals: dict[Node, Refusal] = field(default_factory=dict)
    swallowed: dict[Node, Node] = field(default_factory=dict)
    integer_outputs: bool = False
    inner: dict[Node, Node] = field(default_factory=dict)
    to_float: set[Node] = field(default_factory=set)
    untied: set[tuple[Node, Node]] = field(default_factory=set)

    def is_static(self, node: Node) -> bool:
        """Whether `node` is an operation that may read and write integers."""
        return node in self.claims and self.schemes[node] == "w8a8"

    def produces(self, node: Node) -> bool:
        """Whether `node` is the result of an integer operation with a range of its own."""
        source = self.swallowed.get(node, node)
        if any(cat is node for _, cat in self.untied):
            return True
        return self.is_static(source) and self.claims[source].kind != "carry" and source not in self.to_float

    def carries(self, node: Node) -> bool:
        """Whether `node` passes on the range of its inputs."""
        return node in self.claims and self.claims[node].kind == "carry" and node not in self.swallowed


@dataclass(frozen=True)
class Annotate:
    """See the module's docstring."""

    name: str = "annotate"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Fill `ctx.specs` and `ctx.report`; returns the number of new specs.

        Raises `QuantizationError` where a linear cannot be int8 by size and the recipe does not keep it float.
        """
        plan = _claim(gm, ctx)
        groups = _settle(gm, plan)
        known = len(ctx.specs)
        for group in groups:
            _specify_group(group, plan, ctx)
        for node, claim in plan.claims.items():
            if claim.weight is not None:
                rule = ctx.recipe.rule_for(module_of(node), plan.families[node])
                assert rule.weight is not None
                ctx.specs[Place(claim.weight.name, (node.name,))] = WeightSpec(rule.weight)
            if plan.schemes[node] == "w8a8-dynamic":
                ctx.specs |= {Place(x.name, (node.name,)): RowSpec() for x in claim.inputs}
        integer = {node for group in groups if _is_integer(group, plan) for node in group}
        macs = count_macs(gm, ctx.examples)
        for node in gm.graph.nodes:
            node.meta["source"] = node.name
        ctx.report.decisions = [
            _decide(gm, node, plan, integer, macs.get(node, 0)) for node in gm.graph.nodes if is_call(node)
        ]
        return len(ctx.specs) - known


def _claim(gm: GraphModule, ctx: Context) -> Plan:
    """Ask the families, then the recipe; pair products with the clamps that only they feed."""
    plan = Plan(integer_outputs=ctx.recipe.outputs == "uint8")
    too_long = []
    for node in gm.graph.nodes:
        for family in ctx.families:
            scheme = ctx.recipe.rule_for(module_of(node), family.name).scheme
            assert scheme is not None
            try:
                answer = family.claim(gm, node)
            except CalibrationError:
                if scheme != "float":
                    raise
                answer = Refusal(Reason.USER_EXCLUDED)
            if answer is None:
                continue
            plan.families[node] = family.name
            if scheme == "float":
                plan.refusals[node] = Refusal(Reason.USER_EXCLUDED)
            elif isinstance(answer, Refusal):
                plan.refusals[node] = answer
                if answer.reason is Reason.ACC_OVERFLOW:
                    too_long.append(
                        f"{place_of(node)}: {answer.detail}; keep it float with {_exclusion(node)}, or split it"
                    )
            elif node.name in ctx.unprofitable:
                plan.refusals[node] = Refusal(Reason.UNPROFITABLE, ctx.unprofitable[node.name])
            elif "aliases" in node.meta and answer.kind != "product":
                plan.refusals[node] = Refusal(Reason.ALIASED, f"%{node.meta['aliases']} modifies it in place")
            elif answer.kind != "carry" and scheme not in answer.schemes:
                detail = f"it runs as {' or '.join(answer.schemes)}, not as {scheme}"
                plan.refusals[node] = Refusal(Reason.OTHER_SCHEME, detail)
            else:
                plan.claims[node] = answer
                plan.schemes[node] = "w8a8" if answer.kind == "carry" else scheme
            break
    if too_long:
        raise QuantizationError("an int32 accumulator cannot hold these dot products:\n" + "\n".join(too_long))
    _join(gm, plan)
    for node in plan.claims:
        bounds = float_bounds(node)
        source = node.args[0] if node.args else None
        if bounds is None or not isinstance(source, Node) or len(source.users) != 1:
            continue
        if plan.is_static(source) and plan.claims[source].kind != "carry":
            plan.swallowed[node] = source
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        activation = activation_of(gm, node)
        if not isinstance(source, Node) or len(source.users) != 1 or activation is None:
            continue
        if node in plan.inner or (node in plan.claims and _wants_table(node, source, activation)):
            continue
        kinds = {plan.claims[user].kind for user in node.users if user in plan.claims}
        if plan.is_static(source) and source.target in CONVS | {LINEAR} and ctx.recipe.requant == "float":
            plan.claims.pop(node, None)
            if kinds - {"product"}:
                plan.swallowed[node] = source
    return plan


def _wants_table(node: Node, product: Node, activation: str) -> bool:
    """Whether a table of `node` is faster than the epilogue of the product before.

    Behind a convolution, whose images are large and whose dot products are short, an exponential in float32 takes as
    long as the products themselves. A table rounds what it reads to eight bits, so linears keep their epilogue.
    """
    large = math.prod(node.meta["value"].shape) >= _PAYS
    return product.target in CONVS and activation not in ("relu", "hardsigmoid", "hardswish") and large


def _join(gm: GraphModule, plan: Plan) -> None:
    """Let the largest of the operations that are within one another stand for all of them."""
    for node in reversed(gm.graph.nodes):
        if node in plan.claims:
            for inner in plan.claims[node].inner:
                plan.inner[inner] = node
                plan.claims.pop(inner, None)
                plan.refusals.pop(inner, None)


def _exclusion(node: Node) -> str:
    return f"Recipe(modules={{{module_of(node)!r}: fxq.FLOAT}})"


def _groups(gm: GraphModule, plan: Plan) -> list[set[Node]]:
    """Values tied by carries: the connected components of the graph whose edges lead into carries."""
    ties: nx.Graph[Node] = nx.Graph()
    inner = set(plan.swallowed.values()) | plan.inner.keys()
    ties.add_nodes_from(node for node in gm.graph.nodes if node not in inner)
    ties.add_edges_from(
        (source, node)
        for node in gm.graph.nodes
        if plan.carries(node)
        for source in plan.claims[node].inputs
        if (source, node) not in plan.untied
    )
    return list(nx.connected_components(ties))


def _settle(gm: GraphModule, plan: Plan) -> list[set[Node]]:
    """Give up pointwise operations that do not stand between integers, until none is left to give up.

    So too ranges of their own for what is concatenated, where it or the concatenation stays float.
    """
    plan.untied = {
        (source, node)
        for node in gm.graph.nodes
        if node.target in CAT and plan.carries(node)
        for source in plan.claims[node].inputs
        if any(user is not node and _has_numbers(user) for user in source.users)
    }
    while True:
        groups = _groups(gm, plan)
        writers = {
            node: {member for member in group if plan.produces(member)}
            for group in groups
            if _is_integer(group, plan)
            for node in group
        }
        lost: dict[Node, Reason] = {}
        for node, claim in plan.claims.items():
            if claim.kind != "pointwise":
                continue
            result = _result(node, plan)
            if not any(writers.get(operand, set()) - {result} for operand in claim.inputs):
                lost[node] = Reason.FLOAT_READER if node in plan.to_float else Reason.FLOAT_OPERANDS
            elif result not in writers and node not in plan.to_float:
                lost[node] = Reason.FLOAT_READER
        bound = {(source, cat) for source, cat in plan.untied if source not in writers or cat not in writers}
        plan.untied -= bound
        if not lost and not bound:
            return groups
        for node, reason in lost.items():
            if reason is Reason.FLOAT_READER and plan.claims[node].to_float and node not in plan.to_float:
                plan.to_float.add(node)
                continue
            del plan.claims[node]
            plan.refusals[node] = Refusal(reason)
            for clamp in [clamp for clamp, source in plan.swallowed.items() if source is node]:
                del plan.swallowed[clamp]


def _result(node: Node, plan: Plan) -> Node:
    """The value that an operation writes: its own, or that of the clamp that it swallows."""
    return next((clamp for clamp, source in plan.swallowed.items() if source is node), node)


def _readers(node: Node, plan: Plan) -> Iterator[tuple[Node, bool]]:
    """Who reads the numbers of `node`, carries left out, and whether it reads integers."""
    for user in node.users:
        if is_exit(user):
            yield user, plan.integer_outputs and is_float_tensor(node)
            continue
        if not _has_numbers(user):
            continue  # asks for the shape only
        if plan.carries(user):
            if (node, user) in plan.untied:
                yield user, True
            continue
        user = plan.inner.get(user, user)
        if user in plan.to_float:
            continue  # it takes either
        claim = plan.claims.get(user)
        yield user, claim is not None and plan.is_static(user) and node in claim.inputs and node is not claim.weight


def _has_numbers(node: Node) -> bool:
    value = node.meta.get("value")
    return isinstance(value, Value) or (isinstance(value, tuple | list) and any(isinstance(v, Value) for v in value))


def _is_integer(group: set[Node], plan: Plan) -> bool:
    """Whether an integer operation writes a value of the group, and integer operations alone read it."""
    if not any(plan.produces(node) for node in group) or any("aliases" in node.meta for node in group):
        return False
    reads = [integers for node in group for _, integers in _readers(node, plan)]
    return bool(reads) and all(reads)


def _specify_group(group: set[Node], plan: Plan, ctx: Context) -> None:
    """Specs of one group: one range for all of an integer group, one per edge value in any other."""
    ordered = sorted(group, key=lambda node: node._sort_key)
    if _is_integer(group, plan):
        tensors = [node for node in ordered if is_float_tensor(node)]
        owner = tensors[0]
        range_of_its_own = QuantSpec(_observer(next(node for node in ordered if plan.produces(node)), plan, ctx))
        for node in tensors:
            ctx.specs[Place(node.name)] = range_of_its_own if node is owner else SharedSpec(owner.name)
        return
    for node in ordered:
        batches: dict[tuple[str, Node | None], list[str]] = {}
        for reader, integers in _readers(node, plan):
            if integers:
                alone = reader if "aliases" in node.meta else None  # what is modified in between is read anew
                batches.setdefault((_observer(reader, plan, ctx), alone), []).append(reader.name)
        for (observer, _), readers in batches.items():
            ctx.specs[Place(node.name, tuple(readers))] = QuantSpec(observer)


def _observer(node: Node, plan: Plan, ctx: Context) -> str:
    source = plan.swallowed.get(node, node)
    rule = ctx.recipe.rule_for(module_of(source), plan.families.get(source, ""))
    assert rule.observer is not None
    return rule.observer


def _decide(gm: GraphModule, node: Node, plan: Plan, integer: set[Node], macs: int) -> Decision:
    form: Form = "float"
    reason: Reason | None = None
    detail = ""
    claim = plan.claims.get(node)
    if "untraceable" in node.meta:
        reason, detail = Reason.UNTRACEABLE, node.meta["untraceable"]
    elif node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.RNNBase | nn.RNNCellBase):
        reason = Reason.RECURRENT
    elif claim is not None and claim.kind != "carry":
        form = "int8" if plan.schemes[node].startswith("w8a8") else "weight"
        detail = "its result is float32" if node in plan.to_float else ""
    elif (whole := plan.inner.get(node)) in plan.claims:
        form, detail = "int8", f"one with %{whole}"
    elif node in plan.swallowed:
        form, detail = "int8", f"in the epilogue of {target_name(plan.swallowed[node].target)}"
        if node not in integer:
            form, reason, detail = "float", Reason.FLOAT_READER, ""
    elif claim is not None and node in integer:
        form = "moved"
    elif claim is not None:
        reason = Reason.FLOAT_DATA
    elif node in plan.refusals:
        reason, detail = plan.refusals[node].reason, plan.refusals[node].detail
    elif node.op == "call_module" and not _is_torchs(gm.get_submodule(str(node.target))):
        reason = Reason.LEAF_MODULE
    elif "aliases" in node.meta and not macs:
        reason = Reason.ALIASED
    elif not _has_numbers(node) or not (dtypes := _float_dtypes(node)):
        form, reason = "aside", Reason.NON_FLOAT
    elif any(dtype.is_complex for dtype in dtypes):
        reason, detail = Reason.NO_INTEGER_OP, "it computes complex numbers"
    elif dtypes != {torch.float32}:
        reason, detail = Reason.NOT_FLOAT32, ", ".join(sorted(map(str, dtypes)))
    elif (refusal := plan.refusals.get(plan.inner.get(node, node))) is not None:
        reason, detail = refusal.reason, refusal.detail
    else:
        reason = Reason.NO_INTEGER_OP
        if macs and sum(is_float_tensor(n) and n.op != "get_attr" for n in node.all_input_nodes) > 1:
            detail = "a product of activations that is no part of softmax(q @ k^T * scale + mask) @ v"
    op = target_name(node.target) if node.op != "call_module" else type(gm.get_submodule(str(node.target))).__name__
    scheme = plan.schemes[node] if form in ("int8", "weight") and node in plan.schemes else ""
    return Decision(node.name, module_of(node), line_of(node), op, form, reason, detail, macs, scheme)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _float_dtypes(node: Node) -> set[torch.dtype]:
    """The floating-point and complex types among a node's values."""
    value = node.meta["value"]
    leaves = torch.utils._pytree.tree_leaves(value)
    dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, Value)}
    return {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


PASS = Annotate()
