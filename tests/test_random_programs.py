"""Float programs that nobody thought of: run as fxq runs them, and node by node; the bits are the same.

Each is a random list of steps over all values so far: pointwise functions, views, products, casts and writes in place,
with several outputs that share memory or not. It is called with sizes and dtypes, and with values that share memory, as
the examples had none; what it does to its arguments is what the graph does, and later calls leave earlier results.
"""

import copy
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

import fxq
from fxq.graph import STATE, unchanged

UNARY = (
    *("abs", "ceil", "cos", "erf", "exp", "expm1", "floor", "log", "log1p", "neg", "reciprocal", "relu", "round"),
    *("rsqrt", "sigmoid", "sin", "sqrt", "square", "tanh"),
)
BINARY = ("add", "sub", "mul", "div", "pow")
OPERATORS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow)
NUMBERS = (2, 2.5, -1, 0.0, -0.0, 3, float("inf"), 1e-30)
DTYPES = (torch.int32, torch.float16, torch.float64, torch.bool, torch.complex64, torch.float32)
VIEWS = (
    *(
        lambda a: a.reshape(a.shape),
        lambda a: a.view(-1),
        lambda a: a.transpose(0, -1),
        lambda a: a.expand(2, *a.shape),
    ),
    *(lambda a: a.chunk(2, -1)[0], lambda a: a[..., :3], lambda a: a[-1], lambda a: a.unsqueeze(0), torch.flatten),
    *(lambda a: a.contiguous(), lambda a: a.float(), lambda a: a.detach(), lambda a: a.squeeze(), lambda a: a[:]),
    *(lambda a: a.split(2, -1)[-1], lambda a: a.unbind(0)[0], lambda a: a.narrow(-1, 0, 2), lambda a: a.view_as(a)),
)
OTHERS = (
    *(lambda a, b, c: torch.clamp(a, b, c), lambda a, b, c: torch.minimum(a, b), lambda a, b, c: a.type_as(b)),
    *(lambda a, b, c: a.sum(), lambda a, b, c: a.mean(-1, keepdim=True), lambda a, b, c: a.amax(-1)),
    *(lambda a, b, c: torch.cat([a, b]), lambda a, b, c: torch.stack([a, b]), lambda a, b, c: torch.where(a > 0, b, c)),
    *(lambda a, b, c: torch.add(a, b, alpha=2), lambda a, b, c: torch.div(a, b, rounding_mode="floor")),
    *(lambda a, b, c: a * a, lambda a, b, c: a * a.shape[-1], lambda a, b, c: a @ b, lambda a, b, c: F.linear(a, b)),
)


def a_step(rng):
    """A function of three tensors, most of which read one or two."""
    name, number, compute = rng.choice(BINARY), rng.choice(NUMBERS), rng.choice(OPERATORS)
    kinds = "unary", "unary", "binary", "binary", "number", "number", "reversed", "clamp", "cast", "view", "view"
    match rng.choice([*kinds, "in place", "other"]):
        case "unary":
            owner, one = rng.choice([torch, torch.Tensor]), rng.choice(UNARY)
            return lambda a, b, c: getattr(owner, one)(a)
        case "binary":
            return rng.choice([lambda a, b, c: compute(a, b), lambda a, b, c: getattr(a, name)(b)])
        case "number":
            return rng.choice([lambda a, b, c: compute(a, number), lambda a, b, c: getattr(torch, name)(a, number)])
        case "reversed":
            return lambda a, b, c: compute(number, a)
        case "view":
            view = rng.choice(VIEWS)
            return lambda a, b, c: view(a)
        case "in place":
            own, one = rng.random() < 0.8, rng.choice(["relu_", "exp_", "sigmoid_", "neg_"])
            writes = lambda a, b: getattr(a, one)(), lambda a, b: getattr(a, f"{name}_")(b), lambda a, b: a.mul_(number)
            write = rng.choice(writes)
            return lambda a, b, c: write(a * 1 if own else a, b)
        case "cast":
            dtype = rng.choice(DTYPES)
            return lambda a, b, c: a.to(dtype)
        case "clamp":
            return lambda a, b, c: a.clamp(-1, number)
        case _:
            return rng.choice(OTHERS)


class Program(nn.Module):
    """Steps that work on the examples, and the places of their operands among all values so far."""

    def __init__(self, rng, examples):
        super().__init__()
        self.vector, self.number = nn.Parameter(torch.randn(6)), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("matrix", torch.randn(6, 6))
        self.register_buffer("other", torch.tensor(2.0))
        self.register_buffer("whole", torch.tensor(3))
        self.steps, length = [], rng.randint(4, 14)
        with torch.no_grad():
            while len(self.steps) < length:
                count = len(self.steps) + 9
                places = [rng.choice([count - 1, count - 2, rng.randrange(count)]) for _ in range(3)]
                self.steps.append((a_step(rng), places))
                try:
                    works = all(bool(torch.isfinite(value).all()) for value in self.values(*copied(examples)))
                except (RuntimeError, TypeError, IndexError, ValueError):
                    works = False
                if not works:
                    self.steps.pop()
        outputs = [len(self.steps) + 8, *(rng.randrange(len(self.steps) + 9) for _ in range(rng.randint(0, 2)))]
        self.outputs = outputs[0] if rng.random() < 0.3 else rng.choice([tuple(outputs), outputs, {"a;  b": outputs}])
        self.eval()

    def values(self, x, y, z, t):
        values = [x, y, z, t, self.vector, self.number, self.matrix, self.other, self.whole]
        for step, places in self.steps:
            values.append(step(*(values[place] for place in places)))
        return values

    def forward(self, x, y, z, t):
        values = self.values(x, y, z, t)
        return pytree.tree_map(values.__getitem__, self.outputs)


def calls():
    """Arguments like the examples, which come first, and unlike them."""

    def draw(*sizes):
        return torch.randn(sizes)

    x, y, z, t = draw(3, 4, 6), draw(3, 4, 6), draw(3, 1, 6), draw()
    yield draw(2, 4, 6), draw(2, 4, 6), draw(2, 1, 6), t
    yield x, y, z, t
    yield x[:0], y[:0], z[:0], t
    yield from ((x[:1], y, z, t), (x, y[:1], z, t), (x[:, :1], y, draw(3, 4, 6), t), (x[0], y, z, t), (x, y, z, y))
    yield draw(3, 6, 4).transpose(1, 2), y[:, ::2], z.expand(3, 4, 6), t
    yield from ((x.half(), y, z, t), (x, y.double(), z, t), (x, y, z, t.half()), (x + 0j, y, z, t))
    yield x.half(), y.half(), z.half(), t.half()
    yield from ((t, t.half(), t, t), (t.half(), t.half(), t.half(), t.half()), (x, y, z, 2.5), (x, x, x[:, :1], t))


def copied(values):
    """Tensors in whatever holds them, as a list, each in memory of its own."""
    return [torch.as_tensor(value).clone() for value in pytree.tree_leaves(values)]


def same(values, others):
    """Bit for bit, where NaN is like NaN."""
    return len(values) == len(others) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(values, others, strict=True)
    )


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("seed", range(80))
def test_a_random_program_gives_the_bits_of_its_graph(seed):
    torch.manual_seed(seed)
    examples, *others = calls()
    program = Program(random.Random(seed), examples)
    qmodel = fxq.quantize(program, examples, recipe=fxq.Recipe("float"), progress=False)
    state, earlier, gave = copied(qmodel.state_dict()), [], []
    for arguments in (examples, *others):
        by_node, given = copy.deepcopy((arguments, arguments))  # what shares memory does so still
        try:
            with torch.no_grad(), unchanged(qmodel):
                expected = copied(Interpreter(qmodel).run(*by_node))
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError, fxq.FxqError):
            with pytest.raises((RuntimeError, TypeError, IndexError, ValueError, AttributeError, fxq.FxqError)):
                qmodel(*given)
            continue
        with torch.no_grad(), unchanged(qmodel):
            results = qmodel(*given)
            assert same(copied(results), expected)
            assert same(copied(given), copied(by_node))
        if not qmodel.meta[STATE]:
            earlier, gave = [*earlier, results], [*gave, *expected]
    assert same(copied(earlier), gave)
    assert same(copied(qmodel.state_dict()), state)
