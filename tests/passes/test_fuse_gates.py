"""fuse_gates: squeeze and excite is one call with the same bits as its four."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import numerics
from fxq.expansion import expand_blocks
from fxq.layout import channels_last
from fxq.ops.conv import qconv, qconv_act_quantize
from fxq.ops.gate import qgate
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool
from passes import CONVERT, PREPARE, fuse_gates, fuse_images

WITHOUT = (PREPARE, tuple(step for step in CONVERT if step not in (fuse_gates.PASS, fuse_images.PASS)))


def product(n, k):
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = torch.from_numpy(numerics.pack(w.numpy()))
    return packed, torch.randint(-999, 999, (n,), dtype=torch.int32), torch.rand(n) / (9 * k)


def apart(run, x, z_x, mean, z_mean, *rest):
    first, (activation, scale, z_hidden, *bounds), second, last = rest[:3], rest[3:8], rest[8:11], rest[11:]
    gate, scale_gate, z_gate, m, *epilogue = last
    ones = (1,) * (x.dim() - 2)
    window = "x".join(map(str, ones))
    hidden = run(qadaptive_avg_pool, x, ones, z_x, mean, z_mean, 0, 255)
    if activation:
        hidden = run(qconv_act_quantize, hidden, *first, window, z_mean, activation, scale, z_hidden)
    else:
        hidden = run(qconv, hidden, *first, window, z_mean, z_hidden, *bounds)
    gates = run(qconv_act_quantize, hidden, *second, window, z_hidden, gate, scale_gate, z_gate)
    return run(qmul, x, gates, m, z_x, z_gate, *epilogue)


@pytest.mark.parametrize(
    ("shape", "squeezed"),
    [((2, 5, 4, 3), 7), ((1, 72, 9, 5), 24), ((3, 33, 1, 1), 1), ((0, 4, 3, 3), 2), ((2, 20, 6), 8)],
)
@pytest.mark.parametrize("activation", ["", "silu"])
def test_the_bits_of_all_four(on_isa, shape, squeezed, activation):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    c = shape[1]
    args = 9, 1.7, 30, *product(squeezed, c), activation, 0.02, 11, 11, 250, *product(c, squeezed)
    args = *args, "sigmoid", 1 / 255, 2, 0.006, 40, 40, 255
    doubled = torch.randint(0, 256, (shape[0], 2 * c, *shape[2:]), dtype=torch.uint8)
    for own in (x, channels_last(x), channels_last(doubled)[:, c:], channels_last(x).flip(-1)):
        assert torch.equal(on_isa(qgate, own, *args), apart(on_isa, own, *args))


def test_opcheck_and_what_does_not_fit():
    x = torch.randint(0, 256, (2, 8, 3, 3), dtype=torch.uint8)
    args = [x, 9, 1.7, 30, *product(4, 8), "", 1.0, 0, 0, 255, *product(8, 4), "hardsigmoid", 0.004, 0, 0.01, 0, 0, 255]
    torch.library.opcheck(qgate, args, test_utils=("test_schema", "test_faketensor"))
    for at, value, message in (
        (0, x.float(), "uint8"),
        (4, args[4][:-4], "packed"),
        (6, torch.rand(5), "multiplier"),
        (7, "cosine", "activation"),
        (12, product(20, 4)[0], "packed"),
        (21, 300, "zero_point"),
    ):
        wrong = list(args)
        wrong[at] = value
        with pytest.raises(RuntimeError, match=message):
            qgate(*wrong)


def gated(self, x):
    y = self.stem(x)
    return self.head(y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))))


def gated_by_the_mean(self, x):
    y = self.stem(x)
    return self.head(torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))) * y)


def model_and_input(model_of, forward):
    torch.manual_seed(0)
    layers = {"squeeze": nn.Conv2d(12, 5, 1), "excite": nn.Conv2d(5, 12, 1), "head": nn.Conv2d(12, 4, 1)}
    return model_of(forward, stem=nn.Conv2d(3, 12, 3), **layers), torch.randn(4, 3, 9, 9)


def count(qmodel, target):
    return sum(node.target is target for node in qmodel.graph.nodes)


@pytest.mark.parametrize("forward", [gated, gated_by_the_mean])
def test_four_operations_become_one(model_of, tmp_path, forward):
    model, x = model_and_input(model_of, forward)
    options = {"recipe": fxq.Recipe(judge_costs=False)}
    qmodel, taken_apart = fxq.quantize(model, x, **options), fxq.quantize(model, x, passes=WITHOUT, **options)
    assert (count(qmodel, qgate), count(qmodel, qmul)) == (1, 0)
    assert count(taken_apart, qgate) == 0
    for shape in ((4, 3, 9, 9), (1, 3, 20, 4), (0, 3, 9, 9)):
        y = torch.randn(shape)
        assert torch.equal(qmodel(y), taken_apart(y))
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
    seen, before = (
        [(layer.module, layer.op, layer.alone) for layer in fxq.compare(model, m, x).layers]
        for m in (qmodel, taken_apart)
    )
    assert seen == before
    assert "qconv_act_quantize 5 -> 12, sigmoid" in qmodel.code
    fxq.draw(qmodel, tmp_path / "m.dot")
    fxq.save(qmodel, tmp_path / "m.fxq")
    again = fxq.load(tmp_path / "m.fxq")
    assert torch.equal(again(x), qmodel(x))
    assert again.code == qmodel.code
    assert torch.equal(torch.compile(qmodel, backend="eager")(x), qmodel(x))
    assert fuse_gates.PASS.run(qmodel, None) == 0, "idempotent"


def read_twice(self, x):
    y = self.stem(x)
    gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
    return self.head(y * gate), gate


def of_another(self, x):
    y = self.stem(x)
    return self.head(F.relu(y) * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))))


def not_of_all(self, x):
    y = self.stem(x)
    gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, (1, 7))))))
    return self.head(y * gate)


@pytest.mark.parametrize("forward", [read_twice, of_another, not_of_all])
def test_not_otherwise(model_of, forward):
    model, x = model_and_input(model_of, forward)
    assert count(fxq.quantize(model, x, recipe=fxq.Recipe(judge_costs=False)), qgate) == 0


def test_one_gate_for_all_channels_stays_a_product(model_of):
    torch.manual_seed(0)
    layers = {"squeeze": nn.Conv2d(12, 5, 1), "excite": nn.Conv2d(5, 1, 1), "head": nn.Conv2d(12, 4, 1)}
    model = model_of(gated, stem=nn.Conv2d(3, 12, 3), **layers)
    qmodel = fxq.quantize(model, torch.randn(4, 3, 9, 9), recipe=fxq.Recipe(judge_costs=False))
    layers = expand_blocks(qmodel)
    assert (count(layers, qgate), count(layers, qmul)) == (0, 1)


def test_a_mean_with_bounds_of_its_own_stays(model_of):
    model, x = model_and_input(model_of, gated)
    qmodel = fxq.quantize(model, x, recipe=fxq.Recipe(judge_costs=False), passes=WITHOUT)
    (mean,) = (node for node in qmodel.graph.nodes if node.target is qadaptive_avg_pool)
    mean.args = (*mean.args[:-1], 200)
    assert fuse_gates.PASS.run(qmodel, None) == 0
