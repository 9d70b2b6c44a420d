"""Inside a leaf: the code of a module that cannot be traced stays float, and the modules in it become int8.

`prepare` puts a `Watch` before the forward of each leaf of a graph, and runs the examples. A watched module is
prepared, as a model of its own, on the first call that reaches it; where that fails, the modules in it are watched
instead. So the largest that can be captured are prepared, whether the examples or the calibration data reach them. From
then on they run as prepared, and learn. `convert` puts an integer module in the place of each.

A module that is called several times in a run learns from each call apart, as it would where a graph shows its calls,
on one weight; from all together where their number differs from run to run, is too large, or it keeps state.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from fxq import pipeline, tracing
from fxq.calls import Begin, Calls, PerCall, share_equal
from fxq.decisions import Decision
from fxq.double import narrowed, run
from fxq.errors import FxqError, GuardError, InputError, TraceError
from fxq.graph import SHARED, STATE, unchanged
from fxq.inputs import Call
from fxq.observers import HOLDER, paused
from fxq.pipeline import Context, Pass
from fxq.quantized import QuantizedModule, weight_bytes
from fxq.randomness import Randomness
from fxq.sampling import sample_of
from fxq.tracing.sharing import aliases, tensors_of

META = "leaves"
"""Where a prepared graph's `meta` holds its `Leaves`."""
MOST_CALLS = 8
"""Of one module in a run that learn apart."""
_BEGIN = "_leaf_calls"
"""The submodule of a graph that begins to count the calls inside its leaves."""


@dataclass
class Leaves:
    """What is known of the modules inside the leaves of one prepared graph.

    opaque: what the user wants left alone. own: the decisions about the graph itself. roots: the leaves' paths by node.
    probing: the examples are running, which are counted and not learned from. calls: counts those of modules inside
    leaves; uncounted: runs in the middle of which a module was given up on, and those in it were watched instead.
    """

    ctx: Context
    passes: Sequence[Pass]
    opaque: tracing.Leaves
    own: list[Decision]
    roots: dict[str, str]
    watched: dict[str, Watch] = field(default_factory=dict)
    probing: bool = False
    calls: Calls = field(default_factory=Calls)
    uncounted: set[int] = field(default_factory=set)

    def prepared(self, root: str = "") -> list[Watch]:
        """The watches whose module is prepared, in the leaf at `root` or in all."""
        inside = f"{root}." if root else ""
        return [w for w in self.watched.values() if w.prepared is not None and f"{w.path}.".startswith(inside)]

    def note_decisions(self) -> None:
        """List what is inside each leaf behind it in the report; the leaf keeps the products that only it does."""
        decisions: list[Decision] = []
        done: set[str] = set()
        for own in self.own:
            inner = []
            if (root := self.roots.get(own.node)) is not None and root not in done:
                done.add(root)
                inner = [decision for watch in self.prepared(root) for decision in watch.decisions()]
            decisions += [replace(own, macs=max(0, own.macs - sum(decision.macs for decision in inner))), *inner]
        self.ctx.report.decisions = decisions

    def note_float(self, watch: Watch, why: str) -> None:
        """Say in the report why a module that could weigh stays float, unless the modules in it have their own say."""
        weighs = any(parameter.dim() > 1 for parameter in watch.module.parameters(recurse=False))
        if weighs:
            self.ctx.report.notes.append(f"{watch.path} stays float: {why}")


class Watch:
    """Stands as the `forward` of a leaf or a module inside one; `path` is the module's in the user's model.

    prepared: learns from all calls; apart: those that learn from the first call of a run, the second, ...; fresh: what
    they are copies of.
    """

    def __init__(self, leaves: Leaves, path: str, module: nn.Module, frontend: tracing.Frontend = "auto") -> None:
        self.leaves, self.path, self.module, self.frontend = leaves, path, module, frontend
        self.replaced = module.__dict__.get("forward")
        self.prepared: GraphModule | None = None
        self.fresh: GraphModule | None = None
        self.apart: list[GraphModule] = []
        self.counts: Counter[int] = Counter()
        self.hold()

    def hold(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__["forward"] = self
        self.leaves.watched[self.path] = self

    def release(self) -> None:
        """Give the module its own forward back."""
        del self.module.__dict__["forward"], self.leaves.watched[self.path]
        if self.replaced is not None:
            self.module.__dict__["forward"] = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as prepared, or else as it is."""
        try:
            if self.prepared is None:
                self._prepare(Call(args, kwargs))
            assert self.prepared is not None
            turn = self.leaves.calls.turn(self.path)
            self.counts[self.leaves.calls.runs] = turn + 1
            if not self.leaves.probing:
                call = Call(args, kwargs)
                self._learn(turn, call)
                _offer(self.prepared, call)
                return self._run(self.prepared, call)
            with paused(self.prepared):
                return self._run(self.prepared, Call(args, kwargs))
        except (TraceError, GuardError, InputError, _NotWorthwhileError) as error:
            self.prepared = None
            self._release_all()
            if not isinstance(error, _NotWorthwhileError):
                self.leaves.uncounted.add(self.leaves.calls.runs)
                watch_inside(self.leaves, self.path, self.module)
                self.leaves.note_float(self, error.what if isinstance(error, TraceError) else str(error))
            return self.module.forward(*args, **kwargs)

    def _run(self, gm: GraphModule, call: Call) -> Any:
        """What the leaf gets of its module: float32, in whichever precision that is computed."""
        return narrowed(run(gm, call, double=self.leaves.ctx.recipe.reproducible))

    def _learn(self, turn: int, call: Call) -> None:
        """Let what learns from this turn alone see the call."""
        assert self.prepared is not None
        done = self._numbers(besides=self.leaves.calls.runs)
        if self.prepared.meta.get(STATE) or len(done) > 1 or 1 in done or turn >= min((MOST_CALLS, *done)):
            self.fresh, self.apart = None, []
        if self.fresh is None:
            return
        if turn == len(self.apart):
            self.apart.append(_alias(self.fresh))
        _offer(self.apart[turn], call)
        self._run(self.apart[turn], call.clone())

    def _numbers(self, besides: int = 0) -> set[int]:
        """The numbers of calls in the runs that have reached the module, where they are known."""
        counted = self.counts.keys() - self.leaves.uncounted
        return {self.counts[run] for run in counted or self.counts if run != besides}

    def together(self) -> str:
        """Why the calls of one run cannot learn apart; "" where they can, or there is but one."""
        assert self.prepared is not None
        numbers = sorted(self._numbers())
        if not numbers or numbers[-1] == 1:
            return ""
        if self.prepared.meta.get(STATE):
            return f"one range for its {numbers[-1]} calls in the leaf, since it keeps state"
        if numbers[-1] > MOST_CALLS:
            return f"one range for its {numbers[-1]} calls in the leaf, more than {MOST_CALLS}"
        if len(numbers) > 1:
            texts = ", ".join(map(str, numbers))
            return f"one range for its calls in the leaf, whose number differs from run to run: {texts}"
        return ""

    def members(self) -> list[GraphModule]:
        """What stands for the calls of a run: one for each, or one for all."""
        assert self.prepared is not None
        return [self.prepared] if self.together() else self.apart or [self.prepared] * max(self._numbers(), default=1)

    def decisions(self) -> list[Decision]:
        """What became of the module's operations in each call, under their paths in the whole model."""
        members, together = self.members(), self.together()
        calls = max(self._numbers()) if together else 1
        found = []
        for turn, member in enumerate(members):
            note = f"call {turn + 1} of {len(members)} in the leaf" if len(members) > 1 else together
            for d in cast(Context, member.meta["fxq"]).report.decisions:
                name = f"{self.path}.{d.node}" + (f"#{turn + 1}" if turn else "")
                detail = ", ".join(filter(None, (d.detail, note))) if d.form == "int8" else d.detail
                found.append(replace(d, node=name, macs=d.macs * calls, detail=detail))
        return found

    def _prepare(self, call: Call) -> None:
        self._release_all()
        leaves, outer = self.leaves, self.leaves.ctx
        paths = [path for path, m in self.module.named_modules() if path and _is_opaque(leaves, self._inside(path), m)]
        kinds = [leaf for leaf in leaves.opaque if not isinstance(leaf, str)]
        gm = tracing.trace(self.module, call.args, call.kwargs, leaves=(*kinds, *paths), frontend=self.frontend)
        for node in gm.graph.nodes:
            origin: tracing.Origin = node.meta["origin"]
            node.meta["origin"] = replace(origin, module=self._inside(origin.module))
        recipe = replace(outer.recipe, outputs="float32")  # the leaf's own code reads what the module returns
        ctx = Context(recipe, outer.families, call.clone(), check=outer.check, progress=outer.progress)
        gm = prepare(gm, ctx, leaves.passes, leaves.opaque)
        if not any(decision.form == "int8" for decision in ctx.report.decisions):
            raise _NotWorthwhileError
        self.prepared, self.fresh = gm, _alias(gm)
        self.hold()

    def _inside(self, path: str) -> str:
        return f"{self.path}.{path}" if path else self.path

    def _release_all(self) -> None:
        for module in self.module.modules():
            watch = module.__dict__.get("forward")
            if isinstance(watch, Watch):
                watch.release()


def _alias(gm: GraphModule) -> GraphModule:
    """A copy of a prepared graph that has yet to learn, on the same weights."""
    observers = {id(tensor) for tensor in tensors_of(gm.get_submodule(HOLDER))}
    return copy.deepcopy(gm, aliases(tensor for tensor in tensors_of(gm) if id(tensor) not in observers))


def _offer(gm: GraphModule, call: Call) -> None:
    if (sample := sample_of(gm)) is not None:
        sample.offer(call)


class _NotWorthwhileError(FxqError):
    """Nothing in a module runs on integers."""


def prepare(gm: GraphModule, ctx: Context, passes: Sequence[Pass], opaque: tracing.Leaves) -> GraphModule:
    """Take a traced graph through `passes`, and the modules inside its leaves likewise."""
    gm = prepare_graph(gm, ctx, passes)
    targets = {node.name: str(node.target) for node in gm.graph.nodes if "untraceable" in node.meta}
    if not targets:
        return gm
    roots = {name: "" if target == tracing.WHOLE else target for name, target in targets.items()}
    leaves = gm.meta[META] = Leaves(ctx, passes, opaque, ctx.report.decisions, roots)
    _count_calls(gm, leaves.calls)
    for target in set(targets.values()):
        if target == tracing.WHOLE:
            watch_inside(leaves, "", gm.get_submodule(target))
        else:
            Watch(leaves, target, gm.get_submodule(target), frontend="export")  # The tracer has failed there already.
    leaves.probing = True
    _run_examples(gm, ctx)
    leaves.probing = False
    leaves.note_decisions()
    return gm


def _count_calls(gm: GraphModule, calls: Calls) -> None:
    """Let each run of a graph begin to count."""
    gm.add_module(_BEGIN, Begin(calls))
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
        node = gm.graph.call_module(_BEGIN)
    node.meta |= {"origin": tracing.Origin("", ""), "value": None}
    gm.recompile()


def prepare_graph(gm: GraphModule, ctx: Context, passes: Sequence[Pass]) -> GraphModule:
    """Take a traced graph through `passes`; its leaves stay as they are."""
    ctx.report.guards = tracing.guards(gm)
    ctx.report.frontend = gm.meta["frontend"]
    ctx.report.weight_bytes = (weight_bytes(gm), 0)
    pipeline.begin(gm, ctx)
    gm = pipeline.run(passes, gm, ctx)
    gm.meta["fxq"] = ctx
    return gm


def watch_inside(leaves: Leaves, root: str, leaf: nn.Module) -> None:
    """Watch the modules inside the one at `root`, but for those with hooks: a hook belongs to the leaf's code."""
    for path, module in leaf.named_modules(prefix=root):
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if path != root and not hooked and not scripted and not _is_opaque(leaves, path, module):
            Watch(leaves, path, module)


def calls_of(root: nn.Module, paths: Collection[str], call: Call) -> dict[str, list[Call]]:
    """What the modules at `paths` are called with, in order, when `root` is."""
    found: dict[str, list[Call]] = {path: [] for path in paths}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[path].append(Call(args, kwargs).clone())

        return hook

    watched = [root.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in found]
    own = call.clone()
    try:
        with torch.no_grad(), Randomness():
            root(*own.args, **own.kwargs)
    finally:
        for handle in watched:
            handle.remove()
    return found


def _is_opaque(leaves: Leaves, path: str, module: nn.Module) -> bool:
    """Whether the user wants a module left alone, or one that it is in."""
    outer = [path[:i] for i in range(len(path) + 1) if path[i : i + 1] in (".", "")]
    return any(
        any(fnmatchcase(part, leaf) for part in outer) if isinstance(leaf, str) else isinstance(module, leaf)
        for leaf in leaves.opaque
    )


def convert(gm: GraphModule, passes: Sequence[Pass]) -> QuantizedModule:
    """Take a calibrated graph, which is consumed, through `passes`, and the modules inside its leaves likewise."""
    ctx: Context = gm.meta["fxq"]
    if META in gm.meta:
        _convert_inside(gm, gm.meta.pop(META), passes)
    gm = pipeline.run(passes, gm, ctx)
    ctx.report.weight_bytes = (ctx.report.weight_bytes[0], weight_bytes(gm))
    return QuantizedModule.of(gm, ctx.report)


def _convert_inside(gm: GraphModule, leaves: Leaves, passes: Sequence[Pass]) -> None:
    report = leaves.ctx.report
    watches = list(leaves.watched.values())
    for watch in watches:
        watch.release()
    for watch in watches:
        if watch.prepared is None:
            leaves.note_float(watch, "neither the examples nor the calibration data reach it")
            continue
        converted, several = _convert_each(watch, passes)
        _replace(gm, watch.module, converted)
        try:
            _run_examples(gm, leaves.ctx)
        except Exception as error:
            # The leaf reads more of the module than its result: its weight's dtype, say.
            _replace(gm, converted, watch.module)
            leaves.note_float(watch, f"its leaf does not work with an integer one in its place: {error}")
            continue
        leaves.watched[watch.path] = watch
        for part in several:
            new = [f"{watch.path}: {guard}" for guard in part.report.guards]
            report.guards += [guard for guard in new if guard not in report.guards]
            report.notes += part.report.notes
            report.float_steps += part.report.float_steps
    leaves.note_decisions()
    if not any(isinstance(module, PerCall) for module in gm.modules()):
        for node in gm.graph.find_nodes(op="call_module", target=_BEGIN):
            gm.graph.erase_node(node)
        gm.delete_submodule(_BEGIN)


def _convert_each(watch: Watch, passes: Sequence[Pass]) -> tuple[nn.Module, list[QuantizedModule]]:
    """What stands for a module from now on, and what it is made of."""
    members = watch.members()
    if len(members) == 1:
        converted = convert(members[0], passes)
        return converted, [converted]
    assert watch.prepared is not None
    for member in (together := [*members, watch.prepared]):
        member.meta[SHARED] = True
    several = [convert(member, passes) for member in together]
    share_equal(several)
    return PerCall(watch.leaves.calls, watch.path, several), several[: len(members)]


def _replace(gm: GraphModule, old: nn.Module, new: nn.Module) -> None:
    for parent in list(gm.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _run_examples(gm: GraphModule, ctx: Context) -> None:
    examples = ctx.examples.clone()
    with torch.no_grad(), unchanged(gm), paused(gm):
        gm(*examples.args, **examples.kwargs)
