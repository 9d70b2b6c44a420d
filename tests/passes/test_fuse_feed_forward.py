"""fuse_feed_forward: a feed-forward part with scales per row is one call with the same bits as its two."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import numerics
from fxq.ops.activation import qlinear_act
from fxq.ops.feed_forward import qfeed_forward
from fxq.ops.linear_dynamic import qlinear_dynamic
from passes import CONVERT, PREPARE, fuse_feed_forward

WITHOUT = (PREPARE, tuple(step for step in CONVERT if step is not fuse_feed_forward.PASS))
RECIPE = fxq.Recipe(modules={"narrow": fxq.Rule("w8a8-dynamic")})


def operands(k, wide, n, bias=True):
    first, second = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((wide, k), (n, wide)))
    packed = [torch.from_numpy(numerics.pack(w.numpy())) for w in (first, second)]
    sums = second.sum(1, dtype=torch.int32)
    one = packed[0], torch.randint(-99, 99, (wide,), dtype=torch.int32), torch.rand(wide) / (99 * k), "gelu"
    return one, (packed[1], sums, torch.rand(n) / 99, torch.randn(n) if bias else None)


@pytest.mark.parametrize(
    ("shape", "wide", "n", "addend"),
    [
        ((1, 8), 16, 4, None),
        ((3, 7, 33), 130, 70, (3, 7, 70)),
        ((200, 24), 1536, 48, (200, 48)),
        ((2, 5, 16), 64, 20, (20,)),
        ((1, 5, 16), 64, 20, (4, 1, 20)),
        ((0, 8), 16, 4, (0, 4)),
    ],
)
def test_the_bits_of_both(on_isa, shape, wide, n, addend):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    one, two = operands(shape[-1], wide, n, bias=addend is not None)
    other = None if addend is None else torch.randn(addend)
    expected = on_isa(qlinear_dynamic, on_isa(qlinear_act, x, *one), *two, other)
    assert torch.equal(on_isa(qfeed_forward, x, *one, *two, other), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [9, 40, 500])
def test_any_number_of_threads(threads, rows):
    x = torch.randint(0, 256, (48, rows), dtype=torch.uint8).t()
    one, two = operands(48, 640, 100)
    other = torch.randn(rows, 100)
    expected = qlinear_dynamic(qlinear_act(x, *one), *two, other)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(qfeed_forward(x, *one, *two, other), expected)
    finally:
        torch.set_num_threads(before)
    torch.library.opcheck(qfeed_forward, (x, *one, *two, other), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    x, (one, two) = torch.randint(0, 256, (5, 16), dtype=torch.uint8), operands(16, 64, 20)
    for args, match in (
        ((x.float(), *one, *two), "uint8"),
        ((x, *one, two[0][:-4], *two[1:]), "packed"),
        ((x, *one, *two, torch.randn(4, 20)), "addend"),
    ):
        with pytest.raises(RuntimeError, match=match):
            qfeed_forward(*args)


def parts(activation=F.gelu):
    def forward(self, x):
        return x + self.narrow(activation(self.widen(x)))

    return forward


def model_and_input(model_of, forward):
    torch.manual_seed(0)
    return model_of(forward, widen=nn.Linear(16, 64), narrow=nn.Linear(64, 16)), torch.randn(4, 9, 16)


def count(qmodel, target):
    return sum(node.target is target for node in qmodel.graph.nodes)


@pytest.mark.parametrize("activation", [F.gelu, F.silu])
def test_two_linears_become_one_call(model_of, tmp_path, activation):
    model, x = model_and_input(model_of, parts(activation))
    qmodel, apart = fxq.quantize(model, x, recipe=RECIPE), fxq.quantize(model, x, recipe=RECIPE, passes=WITHOUT)
    assert count(qmodel, qfeed_forward) == 1
    assert count(apart, qfeed_forward) == 0
    for shape in ((4, 9, 16), (1, 1, 16), (2, 70, 16)):
        y = torch.randn(shape)
        assert torch.equal(qmodel(y), apart(y))
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
    seen, before = (
        [(layer.module, layer.op, layer.alone) for layer in fxq.compare(model, m, x).layers] for m in (qmodel, apart)
    )
    assert seen == before
    assert "qlinear_dynamic 64 -> 16" in qmodel.code
    fxq.draw(qmodel, tmp_path / "m.dot")
    fxq.save(qmodel, tmp_path / "m.fxq")
    again = fxq.load(tmp_path / "m.fxq")
    assert torch.equal(again(x), qmodel(x))
    assert again.code == qmodel.code
    assert torch.equal(torch.compile(qmodel, backend="eager")(x), qmodel(x))
    assert fuse_feed_forward.PASS.run(qmodel, None) == 0, "idempotent"


def read_twice(self, x):
    wide = F.gelu(self.widen(x))
    return self.narrow(wide), wide


def clamped(self, x):
    return F.relu(self.narrow(F.gelu(self.widen(x))))


def without_activation(self, x):
    return self.narrow(self.widen(x))


@pytest.mark.parametrize("forward", [read_twice, clamped, without_activation])
def test_others_stay(model_of, forward):
    model, x = model_and_input(model_of, forward)
    assert count(fxq.quantize(model, x, recipe=RECIPE), qfeed_forward) == 0
