"""Teach fxq an operation of one's own, without touching fxq: one pass and one op family.

The network computes mish, x * tanh(softplus(x)), spelled out as people do. fxq would make a table of what torch's three
float operations give. Here a family of one's own goes before it, with a table by the definition of mish in float64.

    the pass     x * tanh(softplus(x))  ->  mish(x)                        three nodes become one
    the family   quantize(mish(dequantize(q)))  ->  lookup(q, table)       256 possible inputs, so 256 answers

    python examples/custom_pass.py
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxq
from fxq.family import Claim, Family
from fxq.graph import get_attr, is_float_tensor, replace, set_constant
from fxq.ops import FAMILIES
from fxq.pattern import Any, Match, Op
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, quantize
from fxq.stages import Stage
from passes import CONVERT, PREPARE, normalize_pointwise

FOLDER = Path("build/custom_pass")


class Net(nn.Module):
    """Two hidden layers with mish between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [B, 16]; returns float32 [B, 4]."""
        x = self.fc1(x)
        x = x * torch.tanh(F.softplus(x))
        x = self.fc2(x)
        x = x * torch.tanh(F.softplus(x))
        y: Tensor = self.head(x)
        return y


# The pass: a name, the stages before and after, what it promises about the numbers, and `run`.

SPELLED_OUT = Op({operator.mul, torch.mul}, Any("x"), Op({torch.tanh}, Op({F.softplus}, Any("x"))))


@dataclass(frozen=True)
class FuseMish:
    """x * tanh(softplus(x)) -> mish(x), where nobody else reads what stands between."""

    name: str = "fuse-mish"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of rewrites."""
        matches = [match for node in gm.graph.nodes if isinstance(match := SPELLED_OUT.match(node), Match)]
        for match in matches:
            replace(gm, match.root, F.mish, (match.node("x"),))
        return len(matches)


# The op: in a library of its own, with a fake implementation so that torch.compile and torch.export take it.


@torch.library.custom_op("mylib::lookup", mutates_args=())
def lookup(q: Tensor, table: Tensor) -> Tensor:
    """table[q]. q: uint8, any shape; table: uint8 [256]."""
    return table[q.int()]


@lookup.register_fake
def _(q: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(q)


def mish_table(s_x: float, z_x: int, s_y: float, z_y: int) -> npt.NDArray[np.uint8]:
    """The NumPy truth: what each of the 256 inputs becomes, by the definition in float64."""
    x = s_x * (np.arange(256) - z_x)
    y = x * np.tanh(np.logaddexp(0, x))
    table: npt.NDArray[np.uint8] = np.clip(np.rint(y / s_y) + z_y, 0, 255).astype(np.uint8)
    return table


# The family: which operations it takes, and what it makes of them.

IN_FLOAT = Op({F.mish}, Op({dequantize}, Any("q"), Any("s_x"), Any("z_x"), shared=True))
BETWEEN_INTEGERS = Op({quantize}, IN_FLOAT, Any("s_y"), Any("z_y"))


@dataclass(frozen=True)
class Mish(Family):
    """mish on integers: a table of 256 entries."""

    name: str = "mish"

    def claim(self, gm: GraphModule, node: Node) -> Claim | None:
        """Any mish of a float32 tensor; its result has a range of its own."""
        x = node.args[0] if node.target is F.mish else None
        return Claim("pointwise", (x,)) if isinstance(x, Node) and is_float_tensor(x) else None

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """quantize(mish(dequantize(q))) -> lookup(q, table)."""
        match = BETWEEN_INTEGERS.match(node)
        if not isinstance(match, Match):
            return False
        table = mish_table(match["s_x"], match["z_x"], match["s_y"], match["z_y"])
        path = set_constant(gm, f"{node.name}_table", torch.from_numpy(table))
        with gm.graph.inserting_before(node):
            operand = get_attr(gm, path, node)
        replace(gm, node, torch.ops.mylib.lookup.default, (match["q"], operand), (match["s_y"], match["z_y"]))
        return True


def main() -> None:
    """The graph before, after the pass, and in integers; then the numbers."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(256, 16)

    position = PREPARE.index(normalize_pointwise.PASS) + 1
    qmodel = fxq.quantize(
        model,
        x,
        recipe=fxq.Recipe(judge_costs=False),  # a lookup in torch is not fast; it is what the example is about
        families=(Mish(), *FAMILIES),  # the first that claims an operation has it
        passes=((*PREPARE[:position], FuseMish(), *PREPARE[position:]), CONVERT),
        check=True,  # every pass, ours too, is held to the numbers that it promises
        dump=FOLDER,
    )
    print("The network as it was traced:\n")
    print(step("trace.txt"))
    print("What the pass changed:\n")
    print(step("fuse-mish.diff"))
    print("In integers:\n")
    print(step("prune.txt"))
    print(fxq.report(qmodel))

    held_out = torch.randn(10_000, 16)
    golden = fxq.golden(qmodel, ops={"mylib.lookup": lambda q, table: table[q]})
    with torch.inference_mode():
        y = qmodel(held_out).numpy()
    same = int((golden(held_out.numpy()) == y).all(1).sum())
    print(f"\nThe whole network against NumPy: the same bits on {same:,} of {len(y):,} inputs")
    without = fxq.quantize(model, x, recipe=fxq.Recipe(judge_costs=False))
    print(f"Against float: {fxq.compare(model, qmodel, held_out).output:.1f} dB SQNR; ", end="")
    print(f"{fxq.compare(model, without, held_out).output:.1f} dB where mish stays float")


def step(name: str) -> str:
    """What the dump holds of one pass."""
    (path,) = FOLDER.glob(f"??-{name}")
    return path.read_text()


if __name__ == "__main__":
    main()
