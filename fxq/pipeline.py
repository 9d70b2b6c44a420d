"""The runner: takes a graph through passes in order, and between them verifies, dumps and times.

A pass rewrites the graph it is given and returns how many rewrites it made. Everything else is done here, once. What a
pass has changed is held to the laws of its stage; it is run on the examples where a pass does not know what its nodes
compute, and in the end. Under `Context.check` it is run after every pass.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from fxq import dump
from fxq.decisions import Report
from fxq.errors import GuardError, VerifyError
from fxq.family import Family
from fxq.graph import NodeError, drop_unread, find_state, is_known, place_of, propagate, unchanged
from fxq.inputs import Call
from fxq.memory import give_back
from fxq.observers import HOLDER, paused
from fxq.qtypes import Spec
from fxq.randomness import seed
from fxq.recipe import Recipe
from fxq.stages import Stage, verify
from fxq.tracing.origin import line_of
from fxq.tracing.values import tensors

AS_TRACED = "as traced"
TOLD = 0.1
"""Seconds. What a method took that has changed nothing is told from here on."""


class Numbers(enum.Enum):
    """What a pass promises about the numbers that the graph computes."""

    SAME = "same bits"
    ROUNDING = "float rounding"
    APPROXIMATE = "approximates"
    ONE_STEP = "at most one integer step per node on equal integer inputs"


@dataclass(frozen=True)
class Place:
    """A value that is wanted quantized: for `readers` (node names) only, or, where None, for everyone who reads it."""

    value: str
    readers: tuple[str, ...] | None = None


@dataclass
class Context:
    """What travels with a graph from trace to result.

    specs: what `annotate` decided, by place. unprofitable: what is not to become int8, by node, and why. dump: the
    folder that dumps go to. timings: (pass, rewrites, seconds). progress: whether passes that take long
    show a bar; None: after two seconds.
    """

    recipe: Recipe
    families: tuple[Family, ...]
    examples: Call
    report: Report = field(default_factory=Report)
    stage: Stage = Stage.FLOAT
    specs: dict[Place, Spec] = field(default_factory=dict)
    unprofitable: dict[str, str] = field(default_factory=dict)
    dump: dump.Folder | None = None
    check: bool = False
    timings: list[tuple[str, int, float]] = field(default_factory=list)
    progress: bool | None = None

    def bar(self, what: str, count: int | None, unit: str = "layer") -> tqdm[NoReturn]:
        """A progress bar of `count` steps, where that is known, on stderr, as `progress` wants it."""
        delay = 0 if self.progress else 2
        return tqdm(total=count, desc=what, unit=unit, delay=delay, disable=self.progress is False, leave=False)


class Pass(Protocol):
    """One move of the compiler. `takes` and `gives` are the stages before and after; `numbers` its contract."""

    @property
    def name(self) -> str: ...
    @property
    def takes(self) -> Stage: ...
    @property
    def gives(self) -> Stage: ...
    @property
    def numbers(self) -> Numbers: ...

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Rewrite `gm` in place; return the number of rewrites. A second run returns 0."""
        ...


def begin(gm: GraphModule, ctx: Context) -> None:
    """Check and dump the float graph as it was traced, before the first pass."""
    examples = ctx.examples.clone()
    with _named(gm, AS_TRACED):
        find_state(gm, examples.args, examples.kwargs)
    verify_values(gm, ctx, AS_TRACED)
    if ctx.dump is not None:
        ctx.dump.write(gm, "trace", ctx.stage.value)


def run(passes: Sequence[Pass], gm: GraphModule, ctx: Context) -> GraphModule:
    """Take `gm` through `passes`; it is modified and returned.

    Raises `VerifyError` naming the pass when a graph leaves it illegal, or, under `ctx.check`, with other numbers than
    it promises.
    """
    changed: list[str] = []
    for step in passes:
        assert ctx.stage is step.takes, f"{step.name} takes {step.takes.value}, the graph is {ctx.stage.value}"
        before = copy.deepcopy(gm) if ctx.check else None
        start = time.perf_counter()
        rewrites = step.run(gm, ctx)
        ctx.stage = step.gives
        if rewrites or step.gives is not step.takes:
            changed.append(step.name)
            gm.graph.lint()
        if ctx.check or (changed and (step is passes[-1] or not is_known(gm))):
            verify_values(gm, ctx, _after(changed or [step.name], ctx))
            changed = []
        elif changed:
            verify_laws(gm, ctx, _after(changed, ctx))
        if rewrites and step.takes is not Stage.FLOAT:
            drop_unread(gm, keep=HOLDER)  # a weight is in memory in one form at a time
            give_back()
        seconds = time.perf_counter() - start
        ctx.timings.append((step.name, rewrites, seconds))
        if step.takes is step.gives is Stage.OBSERVED and (rewrites or seconds > TOLD):
            ctx.report.seconds[step.name] = rewrites, seconds
        if before is not None:
            gm.recompile()
            check_numbers(before, gm, step, ctx)
        if ctx.dump is not None:
            ctx.dump.write(gm, step.name, f"{ctx.stage.value}, {rewrites} rewrites, numbers: {step.numbers.value}")
    gm.recompile()
    return gm


def _after(changed: list[str], ctx: Context) -> str:
    """When: after the pass, or those of several, that a graph has not been run since."""
    return f"after pass {' or '.join(map(repr, changed))} (stage {ctx.stage.value})"


def verify_values(gm: GraphModule, ctx: Context, when: str) -> None:
    """Run the graph on the examples, record every value, and check the laws of its stage."""
    examples = ctx.examples.clone()
    with _named(gm, when), paused(gm):
        propagate(gm, examples.args, examples.kwargs)
    verify_laws(gm, ctx, when)


@contextlib.contextmanager
def _named(gm: GraphModule, when: str) -> Iterator[None]:
    """Raise `VerifyError` for what a node of `gm` raises, with its module and the user's line; a guard's as it is."""
    try:
        yield
    except NodeError as failure:
        cause, node = failure.__cause__, failure.node
        assert cause is not None
        if isinstance(cause, GuardError):  # it names the user's line itself
            raise cause from None
        what = f"{when}: {place_of(node)} raises {type(cause).__name__} in {line_of(cause)}: {cause}"
        raise VerifyError(f"{what}\n{dump.neighbourhood(gm, node)}".rstrip()) from cause


def verify_laws(gm: GraphModule, ctx: Context, when: str) -> None:
    """Check the laws of the stage of a graph, going by the values that its nodes are known to have."""
    broken = verify(gm, ctx.stage)
    if broken is not None:
        node, reason = broken
        raise VerifyError(f"{when}: %{node.name}: {reason}\n{dump.neighbourhood(gm, node)}")


def check_numbers(before: GraphModule, after: GraphModule, step: Pass, ctx: Context) -> None:
    """Raise `VerifyError` when the outputs on the examples differ by more than `step.numbers` allows."""
    if step.numbers in (Numbers.APPROXIMATE, Numbers.ONE_STEP):
        return
    with torch.no_grad(), unchanged(before), unchanged(after), paused(before), paused(after):
        a, b = ctx.examples.clone(), ctx.examples.clone()
        seed()
        expected = before(*a.args, **a.kwargs)
        seed()
        actual = after(*b.args, **b.kwargs)
    pairs = list(zip(tensors(expected), tensors(actual), strict=True))
    for path, (x, y) in enumerate(pairs):
        same = torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())
        if not (same or (step.numbers is Numbers.ROUNDING and _close(x, y))):
            worst = float((x.double() - y.double()).abs().max())
            raise VerifyError(
                f"pass {step.name!r} promises {step.numbers.value!r}, and output {path} of {len(pairs)} differs by "
                f"{worst:.3g} on the examples"
            )


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether `y` is `x` up to float rounding; NaN and infinity in the same places."""
    peak = float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5 * peak, equal_nan=True)
