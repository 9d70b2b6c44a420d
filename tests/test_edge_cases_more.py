"""What people's models hold, cases 41 to 100 by how often, each from the float model to the integers."""

import copy
import io
import pickle
import threading
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxq
from fxq.comparison import output_sqnr
from fxq.decisions import Reason
from fxq.expansion import expand
from fxq.graph import target_name
from fxq.qtypes import MAX_K
from fxq.tracing import TracingWarning
from fxq.tracing.values import tensors

RANDOM = torch.Generator().manual_seed(0)
HERE = r"test_edge_cases_more.py:\d+"


def normal(*shape):
    return torch.randn(*shape, generator=RANDOM)


X, OTHER, SEQ, OTHER_SEQ, IMAGE = normal(64, 8), normal(16, 8), normal(8, 6, 8), normal(5, 6, 8), normal(4, 4, 8, 8)
VOLUME = normal(4, 4, 5, 6, 7)


def linear(n=8, m=8, **options):
    return nn.Linear(n, m, **options)


def fresh(value):
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def run(module, *args, **kwargs):
    """The output, and the inputs as they are afterwards."""
    args, kwargs = fresh((args, kwargs))
    with torch.no_grad():
        return module(*args, **kwargs)


def same(a, b):
    """The same structure and bits."""
    return pytree.tree_structure(a) == pytree.tree_structure(b) and all(
        torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True)
    )


@pytest.fixture
def check(fingerprint):
    """Quantize with every promise checked: 25 dB on the examples and 15 on other inputs, the model as it was."""

    def quantize_and_check(model, *inputs, others=(), kwargs=None, at_least=25, **options):
        model.eval()
        before = fingerprint(model)
        qmodel = fxq.quantize(model, fresh(inputs), example_kwargs=kwargs, check=True, **options)
        assert fingerprint(model) == before
        assert qmodel.report.sqnr >= at_least
        for other in ((*inputs,), *others):
            expected, actual = run(model, *other, **(kwargs or {})), run(qmodel, *other, **(kwargs or {}))
            assert pytree.tree_structure(expected) == pytree.tree_structure(actual)
            assert [(t.shape, t.dtype) for t in tensors(expected)] == [(t.shape, t.dtype) for t in tensors(actual)]
            assert output_sqnr(expected, actual) >= 15
        return qmodel

    return quantize_and_check


def forms(qmodel):
    """What became of each call that computes with numbers."""
    return ", ".join(f"{d.op} {d.form}" for d in qmodel.report.decisions if d.form != "aside")


def reasons(qmodel):
    """Why each float island is one, by operation."""
    return {d.op: d.reason for d in qmodel.report.kept_float()}


def ops(qmodel):
    """Names of all integer ops, those inside chains too."""
    nodes = expand(qmodel).graph.nodes
    return [n.target.name().removeprefix("fxq::") for n in nodes if isinstance(n.target, torch._ops.OpOverload)]


def all_linears_int8(qmodel):
    linears = [d for d in qmodel.report.decisions if d.op == "linear"]
    return bool(linears) and all(d.form == "int8" for d in linears)


def test_case_41_star_args(check, model_of):
    qmodel = check(model_of(lambda s, *args: s.l(args[0]) + args[1], l=linear()), X, X, others=[(OTHER, OTHER)])
    assert all_linears_int8(qmodel)
    with pytest.raises(TypeError):
        qmodel(X)
    inner = model_of(lambda s, *a: s.l(sum(a)), l=linear())
    assert all_linears_int8(check(model_of(lambda s, x, *rest: s.m(x, *rest), m=inner), X, X, X))


def test_case_41_star_args_beside_arguments_of_their_names(check, model_of):
    model = model_of(lambda s, *a, **k: s.l(a[0] - a[1] + k["a_1"]) + k["a__0"], l=linear())
    check(model, X, 2 * X, kwargs={"a_1": 3 * X, "a__0": X})


@pytest.mark.parametrize("name", ["a-b", "class"])
def test_case_42_keywords_that_are_no_names(name, model_of):
    model = model_of(lambda s, x, **kw: s.l(x + kw[name]), l=linear())
    with pytest.raises(fxq.InputError, match=rf"argument '{name}' of `\*\*kw` has a name that no code can have; call"):
        fxq.quantize(model, X, example_kwargs={name: X})


def test_case_42_star_star_kwargs(check, model_of):
    model = model_of(lambda s, x, **kw: s.l(x + sum(kw.values())), l=linear())
    assert all_linears_int8(check(model, X, others=[(OTHER,)]))
    qmodel = check(model, X, kwargs={"a": X, "b": X})
    assert output_sqnr(run(model, OTHER, a=OTHER, b=OTHER), run(qmodel, OTHER, a=OTHER, b=OTHER)) > 15


def test_case_43_containers_as_inputs(check, model_of):
    model = model_of(lambda s, d: s.l(d["a"]) + d["b"][0], l=linear())
    check(model, {"a": X, "b": (X, None)}, others=[({"a": OTHER, "b": (OTHER, None)},)])
    model = model_of(lambda s, xs: sum(s.l(x) for x in xs), l=linear())
    qmodel = check(model, [X, X + 1], others=[([OTHER, OTHER],)])
    with pytest.raises(fxq.GuardError, match="argument `xs` was"):
        qmodel([X, X, X])


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def test_case_44_structured_outputs(check, model_of):
    model = model_of(lambda s, x: {"a": s.l(x), "b": [x, None]}, l=linear())
    assert list(check(model, X, others=[(OTHER,)])(X)) == ["a", "b"]
    out = check(model_of(lambda s, x: Pair(s.l(x), None), l=linear()), X, others=[(OTHER,)])(X)
    assert type(out) is Pair and out.second is None


@dataclass
class Output:
    hidden: torch.Tensor
    state: torch.Tensor | None = None


def test_case_45_dataclass_outputs(model_of):
    from transformers.modeling_outputs import BaseModelOutput

    for kind, name in ((Output, "hidden"), (BaseModelOutput, "last_hidden_state")):
        model = model_of(lambda s, x, kind=kind, name=name: kind(**{name: s.l(x)}), l=linear())
        qmodel = fxq.quantize(model, X)
        out = qmodel(OTHER)
        assert type(out) is kind
        assert 25 < qmodel.report.sqnr < 100
        assert output_sqnr(getattr(model(OTHER), name), getattr(out, name)) > 25


def test_case_46_float_argument(check, model_of):
    qmodel = check(model_of(lambda s, x, alpha: s.l(x) * alpha, l=linear()), X, 0.5, others=[(OTHER, 0.25)])
    assert all_linears_int8(qmodel) and not qmodel.report.guards


def test_case_47_bool_argument(check, model_of):
    qmodel = check(model_of(lambda s, x, flag: s.l(x) if flag else x, l=linear()), X, True, others=[(OTHER, True)])
    with pytest.raises(fxq.GuardError, match="argument `flag` was True"):
        qmodel(X, False)


def test_case_48_int_argument_as_dim(check, model_of):
    check(model_of(lambda s, x, dim: s.l(x).softmax(dim), l=linear()), X, 1, others=[(OTHER, 1), (X, 0)])


def test_case_49_ids_into_an_embedding(check):
    model = nn.Sequential(nn.Embedding(20, 8), linear())
    ids = torch.randint(0, 20, (8, 5))
    qmodel = check(model, ids, others=[(ids[:3],)])
    assert forms(qmodel) == "embedding int8, linear int8"
    assert {target_name(n.target) for n in qmodel.graph.nodes if n.args[:1] == (next(iter(qmodel.graph.nodes)),)} == {
        "fxq.qembedding"
    }


def test_case_50_item_as_a_scalar(check, model_of):
    model = model_of(lambda s, x: s.l(x) * x.max().item(), l=linear())
    assert all_linears_int8(check(model, X, others=[(OTHER,)]))


def through_numpy(self, x):
    return torch.from_numpy(np.tanh(self.l(x).numpy()))


def test_case_51_numpy_round_trip(check, model_of):
    with pytest.raises(fxq.TraceError, match=rf"{HERE} needs the value .*numpy.*frontend='leaf'"):
        fxq.quantize(model_of(through_numpy, l=linear()), X)
    model = nn.Sequential(linear(), model_of(through_numpy, l=linear()), linear())
    qmodel = check(model, X, others=[(OTHER,)])
    assert reasons(qmodel) == {"Model": Reason.UNTRACEABLE}
    assert qmodel.report.int8_share == 1


def by_sum(self, x):
    return self.l(x) if x.sum() > 0 else self.k(x)


def until_small(self, x):
    while x.abs().max() > 10:
        x = x / 2
    return self.l(x)


@pytest.mark.filterwarnings("ignore::fxq.KeptFloatWarning")
@pytest.mark.parametrize("forward", [by_sum, until_small])
def test_case_52_decisions_on_data(forward, model_of):
    model = model_of(forward, l=linear(), k=linear())
    with pytest.raises(fxq.TraceError, match=rf"{HERE} .*pass frontend='leaf'"):
        fxq.quantize(model, X)
    assert not vars(X)  # torch.export, which was tried, has not marked the user's tensor
    data = [X, -X, X + 1, X - 1, 4 * X]
    qmodel = fxq.quantize(model, X, calibration_data=data, frontend="leaf")  # the remedy
    for x in data:
        assert output_sqnr(run(model, x), run(qmodel, x)) >= 20


def test_case_53_isinstance(check, model_of):
    def forward(self, x):
        return self.l(x) if isinstance(x, torch.Tensor) and torch.is_tensor(x) else self.k(x)

    model = model_of(forward, l=linear(), k=linear())
    qmodel = check(model, X, others=[(OTHER,)])
    assert [d.module for d in qmodel.report.decisions] == ["l"]


def helper(x):
    return x.flip(0) if x.sum() > 0 else x


torch.fx.wrap("helper")


def test_case_54_wrapped_helper(check, model_of):
    qmodel = check(model_of(lambda s, x: s.k(helper(s.l(x))), l=linear(), k=linear()), X, others=[(-X,), (OTHER,)])
    assert forms(qmodel) == "linear int8, helper float, linear int8"


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_case_55_leaves_and_autograd_functions(check, model_of):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            return self.inner(x).tanh()

    model = nn.Sequential(linear(), Custom(), linear())
    qmodel = check(model, X, others=[(OTHER,)], leaves=(Custom,))
    assert forms(qmodel) == "linear int8, Custom float, linear int8"
    assert reasons(qmodel)["Custom"] is Reason.LEAF_MODULE
    assert all_linears_int8(check(model, X, others=[(OTHER,)]))
    model = model_of(lambda s, x: s.k(Doubled.apply(s.l(x))), l=linear(), k=linear())
    assert all_linears_int8(check(model, X, others=[(OTHER,)]))


def test_case_56_hooks(check):
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    model.register_forward_hook(lambda module, args, out: out * 3)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, out: out + args[0])
    qmodel = check(model, X, others=[(OTHER,)])
    assert all_linears_int8(qmodel)
    assert [d.op for d in qmodel.report.decisions] == ["add", "linear", "add", "relu", "linear", "mul"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_case_57_weight_norm(wrap, check):
    qmodel = check(nn.Sequential(wrap(linear()), nn.ReLU(), linear()), X, others=[(OTHER,)])
    assert forms(qmodel) == "linear int8, relu int8, linear int8"


def test_case_58_subclass_of_linear(check):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    qmodel = check(nn.Sequential(Scaled(8, 8), linear()), X, others=[(OTHER,)])
    assert [d.op for d in qmodel.report.decisions] == ["linear", "mul", "linear"]


def batch_norm(n=8, dims=1, **options):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](n, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_(generator=RANDOM)
        norm.running_var.uniform_(0.5, 2, generator=RANDOM)
    if norm.affine:
        norm.weight.data.uniform_(0.5, 2, generator=RANDOM)
    return norm


def test_case_59_batch_norm(check):
    for options in ({}, {"affine": False}):
        model = nn.Sequential(linear(), batch_norm(**options), batch_norm(), nn.ReLU(), linear())
        assert forms(check(model, X, others=[(OTHER,)])) == "linear int8, relu int8, linear int8"
    model = nn.Sequential(linear(), batch_norm(track_running_stats=False), nn.ReLU(), linear())
    assert reasons(check(model, X))["BatchNorm1d"] is Reason.NO_INTEGER_OP
    model = nn.Sequential(nn.Conv2d(4, 8, 3), batch_norm(dims=2), nn.ReLU(), nn.Flatten(), linear(288))
    assert forms(check(model, IMAGE, others=[(IMAGE[:2],)])) == "conv2d int8, relu int8, flatten moved, linear int8"


def test_case_60_one_batch_norm_behind_two_layers(check, model_of):
    model = model_of(lambda s, x: s.n(s.l(x)) + s.n(s.k(x)), l=linear(), k=linear(), n=batch_norm())
    qmodel = check(model, X, others=[(OTHER,)])
    assert all_linears_int8(qmodel)
    assert [d.op for d in qmodel.report.decisions].count("batch_norm") == 2


def test_case_61_attention_layers(check, model_of):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    qmodel = check(model_of(lambda s, x: s.a(x, x, x)[0], a=attention), SEQ, others=[(OTHER_SEQ,)])
    assert all_linears_int8(qmodel)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model in (layer, nn.TransformerEncoder(layer, 2), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)):
        qmodel = check(model, SEQ, others=[(OTHER_SEQ,)])
        assert all_linears_int8(qmodel)
        assert {"Conv2d", "linear"}.isdisjoint(reasons(qmodel))


def attention(self, x):
    b, t, c = x.size()
    q, k, v = self.qkv(x).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    y = torch.softmax((q @ k.transpose(-2, -1)) / k.size(-1) ** 0.5, -1) @ v
    y = y + F.scaled_dot_product_attention(q, k, v)
    return self.out(y.transpose(1, 2).reshape(b, t, c))


def test_case_62_manual_attention(check, model_of):
    qmodel = check(model_of(attention, qkv=linear(8, 24), out=linear()), SEQ, others=[(OTHER_SEQ,)])
    assert all_linears_int8(qmodel)
    assert [d.form for d in qmodel.report.decisions if d.op == "attention"] == ["int8", "int8"]
    assert {"softmax", "matmul", "scaled_dot_product_attention"}.isdisjoint(reasons(qmodel))


def test_case_63_recurrent_layers(check, model_of):
    for kind in (nn.LSTM, nn.GRU):
        model = model_of(lambda s, x: s.k(s.r(s.l(x))[0]), l=linear(), r=kind(8, 8, batch_first=True), k=linear())
        qmodel = check(model, SEQ, others=[(OTHER_SEQ,)])
        assert all_linears_int8(qmodel)
        (refusal,) = qmodel.report.refusals()
        assert refusal.op == kind.__name__ and refusal.macs == 8 * 6 * (4 if kind is nn.LSTM else 3) * 8 * 16

    def forward(self, x):
        h = torch.zeros(x.size(0), 8)
        for i in range(x.size(1)):
            h = self.c(x[:, i], h)
        return self.k(h)

    qmodel = check(model_of(forward, c=nn.GRUCell(8, 8), k=linear()), SEQ, others=[(OTHER_SEQ,)])
    assert qmodel.report.kept_float()


CONVOLUTIONS = [
    (nn.Conv2d(4, 8, 3, padding=1), IMAGE),
    (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGE),
    (nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"), IMAGE),
    (nn.Conv2d(4, 8, 3, padding=1, padding_mode="replicate"), IMAGE),
    (nn.Conv2d(4, 8, 3, groups=2, stride=2), IMAGE),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same"), IMAGE),
    (nn.Conv2d(4, 8, (2, 4), padding="same", bias=False), IMAGE),
    (nn.Conv2d(4, 8, (3, 1), (1, 2), padding="valid"), IMAGE),
    (nn.Conv1d(6, 4, 3, dilation=2, padding=2), SEQ),
    (nn.Conv1d(6, 4, 4, padding="same"), SEQ),
    (nn.Conv3d(4, 8, 3, padding=1), VOLUME),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("conv", "x"), CONVOLUTIONS)
def test_case_64_convolutions(conv, x, check):
    """Zero padding pads with the zero point; the other kinds move integers before the product."""
    qmodel = check(nn.Sequential(conv, nn.ReLU(), linear(conv(x).shape[-1])), x, others=[(x[:2],)])
    assert not qmodel.report.refusals() and all_linears_int8(qmodel)
    assert [d.form for d in qmodel.report.decisions if d.op.startswith("conv")] == ["int8"]


TRANSPOSED = [
    (nn.ConvTranspose2d(4, 4, 3, 2), IMAGE),
    (nn.ConvTranspose2d(4, 6, (2, 3), (3, 2), padding=1, output_padding=(0, 1), dilation=2), IMAGE),
    (nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), IMAGE),
    (nn.ConvTranspose1d(6, 4, 3), SEQ),
    (nn.ConvTranspose3d(4, 2, 2, 2), VOLUME),
]


@pytest.mark.parametrize(("conv", "x"), TRANSPOSED)
def test_case_65_transposed_convolutions(conv, x, check):
    """Their weight's output channels are on another axis; each gets its scale all the same."""
    conv.weight.data *= torch.logspace(-2, 2, conv.weight.shape[1]).reshape(1, -1, *[1] * (x.dim() - 2))
    model = nn.Sequential(conv, nn.ReLU(), linear(conv(x).shape[-1]))
    qmodel = check(model, x, others=[(x[:2],)])
    assert not qmodel.report.refusals() and all_linears_int8(qmodel)
    alone = fxq.quantize(nn.Sequential(conv).eval(), x)
    expected, actual = conv(x), alone(x)
    for channel in range(expected.shape[1]):
        assert fxq.comparison.sqnr(expected[:, channel], actual[:, channel]) > 35


def test_case_66_bilinear(check, model_of):
    qmodel = check(model_of(lambda s, x: s.b(x, s.l(x)), l=linear(), b=nn.Bilinear(8, 8, 3)), X, others=[(OTHER,)])
    (refusal,) = qmodel.report.refusals()
    assert refusal.reason is Reason.NO_INTEGER_OP and refusal.op.lower() == "bilinear"
    assert refusal.macs == len(X) * 3 * 8 * 8


def test_case_67_layer_norm(check, model_of):
    model = model_of(lambda s, x: s.l(F.layer_norm(s.n(x), x.shape[-1:])), l=linear(), n=nn.LayerNorm(8))
    qmodel = check(model, SEQ, others=[(OTHER_SEQ,)])
    assert forms(qmodel) == "LayerNorm float, layer_norm float, linear int8"


def test_case_68_pools_and_selections(check, model_of):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear())
    assert all_linears_int8(check(model, IMAGE, others=[(IMAGE[:2],)]))
    model = model_of(lambda s, x: F.interpolate(s.l(x), scale_factor=2, mode="bilinear"), l=linear())
    assert all_linears_int8(check(model, IMAGE, others=[(IMAGE[:2],)]))

    def forward(self, x):
        y = self.l(torch.where(x > 0, x, x.topk(2).values[:, :1]))
        return self.k(y[x[:, 0] > 0])

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert all_linears_int8(qmodel)


def test_case_69_ranks_and_strides(check):
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    for x in (X[0], X, SEQ, IMAGE, normal(2, 2, 2, 2, 8)):
        qmodel = check(model, x)
        assert all_linears_int8(qmodel)
    qmodel = check(model, X, others=[(X.t().contiguous().t(),)])
    assert torch.equal(qmodel(X[::2]), qmodel(X)[::2])
    assert qmodel(X[:0]).shape == (0, 8)
    check(nn.Sequential(linear(1, 8), nn.ReLU(), linear(8, 1)), normal(64, 1), others=[(normal(5, 1),)])


def test_case_70_a_row_of_zeros(check):
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    with torch.no_grad():
        model[0].weight[3] = 0
        model[2].weight.zero_()
    qmodel = check(model, X, others=[(OTHER,)])
    assert torch.isfinite(qmodel(X)).all()
    assert output_sqnr(model(X), qmodel(X)) > 40


def test_case_71_an_outlier_weight(check):
    model = nn.Sequential(linear(), linear())
    with torch.no_grad():
        model[1].weight[3, 3] = 1e4
    qmodel = check(model, X)
    rows = [i for i in range(8) if i != 3]
    assert output_sqnr(model(X)[:, rows], qmodel(X)[:, rows]) > 25


@pytest.mark.filterwarnings("ignore::fxq.AccuracyWarning")
def test_case_72_calibration_with_zeros():
    model = nn.Sequential(linear(bias=False), nn.ReLU(), linear(bias=False)).eval()
    qmodel = fxq.quantize(model, torch.zeros(4, 8))
    scales = [n.meta["qparams"][0] for n in expand(qmodel).graph.nodes if "qparams" in n.meta]
    assert scales and all(scale > 0 and np.isfinite(scale) for scale in scales)
    assert torch.equal(qmodel(torch.zeros(4, 8)), torch.zeros(4, 8))
    assert torch.isfinite(qmodel(X)).all()


def test_case_73_a_range_that_is_all_positive(check):
    qmodel = check(nn.Sequential(linear(), nn.Sigmoid(), linear()), X.abs() + 5, others=[(OTHER.abs() + 5,)])
    for node in expand(qmodel).graph.nodes:
        if "qparams" in node.meta:
            assert 0 <= node.meta["qparams"][1] <= 255
    first = next(n for n in qmodel.graph.nodes if "qparams" in n.meta)
    assert first.meta["qparams"][1] == 0  # zero is representable, and the lowest value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_case_74_values_that_are_not_finite(bad, model_of):
    batch = X.clone()
    batch[3, 5] = bad
    with pytest.raises(fxq.CalibrationError, match=r"calibration batch 1: input 0 holds .* at flat index 29"):
        fxq.quantize(linear().eval(), X, calibration_data=[X, batch])
    model = model_of(lambda s, x: s.l(x.log()), l=linear())
    with pytest.raises(fxq.CalibrationError, match=r"calibration batch 1: .*\bl\b"):
        fxq.quantize(model, X.abs() + 1, calibration_data=[X.abs() + 1, X])


@pytest.mark.filterwarnings("ignore::fxq.KeptFloatWarning")
def test_case_75_a_branch_that_was_not_reached(model_of):
    model = nn.Sequential(linear(), model_of(by_sum, l=linear(), k=linear())).eval()
    reached = "l" if model[0](X).sum() > 0 else "k"
    qmodel = fxq.quantize(model, X)
    assert {d.module for d in qmodel.report.decisions if d.form == "int8"} == {"0", f"1.{reached}"}
    assert any("neither the examples nor the calibration data reach it" in note for note in qmodel.report.notes)
    for x in (X, -X, X[:5], -X[:5]):
        assert output_sqnr(run(model, x), run(qmodel, x)) > 15
    with pytest.raises(fxq.CalibrationError, match="never computed while calibrating"):
        fxq.convert(fxq.prepare(nn.Sequential(linear()).eval(), X))


def test_case_76_trivial_graphs(model_of):
    spare = linear()
    for forward in (lambda s, x, unused: x, lambda s, x, unused: (x, x), lambda s, x, unused: [s.l(x)] * 2):
        model = model_of(forward, l=linear(), spare=spare)
        qmodel = fxq.quantize(model, (X, X))
        assert output_sqnr(run(model, OTHER, OTHER), run(qmodel, OTHER, OTHER)) > 15
        assert not any("spare" in name for name in qmodel.state_dict())
    twice = qmodel(X, X)
    assert twice[0] is twice[1]


def test_case_77_float_output(check, model_of):
    qmodel = check(nn.Sequential(linear(), nn.ReLU(), linear()), X, others=[(OTHER,)])
    assert ops(qmodel)[-1] == "qlinear_float"
    assert qmodel(X).dtype == torch.float32
    model = model_of(lambda s, x: s.l(x).relu().reshape(-1), l=linear())
    assert check(model, X, others=[(OTHER,)])(X).dtype == torch.float32
    qmodel = fxq.quantize(model, X, recipe=fxq.Recipe(outputs="uint8"), check=True)  # more in test_outputs.py
    assert qmodel(OTHER).dtype == torch.uint8
    assert output_sqnr(run(model, OTHER), qmodel.dequantize(qmodel(OTHER))) > 25


def test_case_78_a_buffer_that_forward_changes(model_of):
    def forward(self, x):
        self.buf.add_(1)
        return self.l(x) + self.buf

    model = model_of(forward, l=linear(), buf=torch.zeros(1))
    qmodel = fxq.quantize(model, X)
    assert model.buf.item() == 0 and qmodel.buf.item() == 0
    for _ in range(3):
        assert output_sqnr(run(model, OTHER), run(qmodel, OTHER)) > 25
    assert qmodel.buf.item() == 3


def test_case_79_results_left_on_the_module(model_of):
    def forward(self, x):
        self.cache = self.l(x)
        return self.cache * 2

    model = model_of(forward, l=linear())
    with pytest.warns(TracingWarning, match="leaves a result of its forward in `cache`"):
        qmodel = fxq.quantize(model, X)
    assert not hasattr(model, "cache") and not hasattr(qmodel, "cache")
    assert output_sqnr(run(model, OTHER), run(qmodel, OTHER)) > 15


def test_case_80_prints(model_of, capsys):
    def forward(self, x):
        print(f"{x.shape[0]:3d} {x.shape} {x.mean():.1f}")
        return self.l(x)

    with pytest.warns(TracingWarning, match=rf"{HERE} prints while it is traced; the graph does not"):
        qmodel = fxq.quantize(model_of(forward, l=linear()), X)
    assert capsys.readouterr().out
    qmodel(OTHER)
    assert capsys.readouterr().out == ""


def test_case_81_contexts(check, model_of):
    def forward(self, x):
        try:
            y = self.l(x)
        except ValueError:
            y = self.k(x)
        with torch.no_grad():
            y = y + 1
        return y if torch.jit.is_scripting() else -y

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert {d.module for d in qmodel.report.decisions if d.op == "linear"} == {"l"}


def test_case_82_checkpoint(check, model_of):
    from torch.utils.checkpoint import checkpoint

    model = model_of(lambda s, x: checkpoint(s.l, x, use_reentrant=False), l=nn.Sequential(linear(), nn.ReLU()))
    assert forms(check(model, X, others=[(OTHER,)])) == "linear int8, relu float"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_case_83_scripted_submodule(check, model_of):
    scripted = torch.jit.script(nn.Sequential(linear(), nn.Tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxq.KeptFloatWarning)
        qmodel = check(model_of(lambda s, x: s.k(s.m(x)), m=scripted, k=linear()), X, others=[(OTHER,)])
    (decision,) = [d for d in qmodel.report.decisions if d.module == "m"]
    assert decision.form == "float" and decision.reason in (Reason.LEAF_MODULE, Reason.UNTRACEABLE)
    assert all_linears_int8(qmodel)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_case_84_wrapped_models(check):
    inner = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    expected = check(inner, X)(OTHER)
    for wrapped in (torch.fx.symbolic_trace(inner), nn.DataParallel(inner), torch.compile(inner)):
        qmodel = fxq.quantize(wrapped, X)
        assert torch.equal(qmodel(OTHER), expected)
        assert [d.module for d in qmodel.report.decisions] == ["0", "1", "2"]


def test_case_85_other_devices():
    with pytest.raises(fxq.InputError, match=r"weight is on the device meta.*load its weights first"):
        fxq.quantize(linear().to("meta"), X)
    with pytest.raises(fxq.InputError, match=r"input 0 is on the device meta.*\.cpu\(\)"):
        fxq.quantize(linear().eval(), X.to("meta"))


def test_case_86_quantizing_twice():
    qmodel = fxq.quantize(nn.Sequential(linear()).eval(), X)
    before = qmodel(X)
    with pytest.raises(fxq.InputError, match="already quantized"):
        fxq.quantize(qmodel, X)
    assert torch.equal(qmodel(X), before)


def test_case_87_the_model_stays_as_it_was(fingerprint):
    model = nn.Sequential(linear(), nn.Dropout(), nn.BatchNorm1d(8), nn.ReLU(inplace=True), linear())
    model[0].requires_grad_(False)
    before, inputs = fingerprint(model), X.clone()
    with pytest.warns(TracingWarning, match="training mode"):
        fxq.quantize(model, inputs, calibration_data=[inputs])
    assert fingerprint(model) == before and all(m.training for m in model.modules())
    assert torch.equal(inputs, X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_case_88_copies(check, model_of, tmp_path):
    model = model_of(lambda s, x: s.k(s.l(x).relu().reshape(x.shape[0], -1)), l=linear(), k=linear())
    qmodel = check(model, X)
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    fxq.save(qmodel, tmp_path / "model.fxq")
    dynamic = torch.export.export(qmodel, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.jit.save(torch.jit.trace(nn.Sequential(qmodel), X), tmp_path / "model.pt")
    traced = torch.jit.load(tmp_path / "model.pt")
    for other in (
        copy.deepcopy(qmodel),
        pickle.loads(pickle.dumps(qmodel)),
        torch.load(buffer, weights_only=False),
        fxq.load(tmp_path / "model.fxq"),
        torch.jit.trace(qmodel, X),
        traced,
        getattr(traced, "0"),
        dynamic.module(),
    ):
        assert torch.equal(other(OTHER), qmodel(OTHER))


def test_case_89_two_threads():
    qmodel = fxq.quantize(nn.Sequential(linear(), nn.ReLU(), linear()).eval(), X)
    batches = [X, OTHER]
    expected = [qmodel(x) for x in batches]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(50) if not torch.equal(qmodel(batches[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_case_90_modes_around_a_call(check):
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    qmodel = check(model, X.clone().requires_grad_())
    expected = qmodel(X)
    assert torch.equal(qmodel(X.clone().requires_grad_()), expected)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(qmodel(X), expected)
    with torch.inference_mode():
        assert torch.equal(fxq.quantize(model, X)(X), expected)


def test_case_91_a_dot_product_that_is_too_long(check):
    model = nn.Sequential(linear(MAX_K + 1, 2), linear(2, 2)).eval()
    x = normal(4, MAX_K + 1)
    with pytest.raises(
        fxq.QuantizationError, match=rf"K = {MAX_K + 1} exceeds .*Recipe\(modules=\{{'0': fxq.FLOAT\}}\)"
    ):
        fxq.quantize(model, x)
    qmodel = check(model, x, recipe=fxq.Recipe(modules={"0": fxq.FLOAT}))  # the remedy
    assert forms(qmodel) == "linear float, linear int8"
    longest = linear(MAX_K, 1)
    with torch.no_grad():
        longest.weight.fill_(1)
    ones = torch.ones(2, MAX_K)
    assert output_sqnr(longest(ones), check(longest, ones)(ones)) > 40


def test_case_92_a_bias_that_is_too_large(check):
    model = nn.Sequential(linear(), linear())
    with torch.no_grad():
        model[0].weight.mul_(1e-7)
        model[0].bias.fill_(1e6)
    qmodel = check(model, X)
    assert "bias is too large for an int32" in " ".join(qmodel.report.notes)


def test_case_93_multipliers_above_one_and_tiny(check, model_of):
    model = model_of(lambda s, x: s.k(s.l(x).clamp(-1e-3, 1e-3)), l=linear(), k=linear())
    with torch.no_grad():
        model.l.weight.mul_(1e4)
    qmodel = check(model, X, others=[(OTHER,)])
    assert expand(qmodel).get_buffer("l.multiplier").max() > 1
    model = nn.Sequential(linear(bias=False), linear(bias=False))
    with torch.no_grad():
        model[0].weight[:4] *= 2.0**-40
    qmodel = check(model, X, others=[(OTHER,)])
    multiplier = expand(qmodel).get_buffer("0.multiplier")
    assert 0 < multiplier.min() < 2.0**-31


@pytest.mark.filterwarnings("ignore::fxq.AccuracyWarning")
def test_case_94_scales_have_a_floor():
    model = nn.Sequential(linear(bias=False), nn.ReLU(), linear(bias=False)).eval()
    qmodel = fxq.quantize(model, X * 1e-42)
    scales = [n.meta["qparams"][0] for n in expand(qmodel).graph.nodes if "qparams" in n.meta]
    assert scales and all(scale >= 2.0**-60 and np.isfinite(1 / np.float32(scale)) for scale in scales)
    for x in (X * 1e-42, X):
        assert torch.isfinite(qmodel(x)).all()


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [(nn.ReLU(), 0, None), (nn.ReLU6(), 0, 6), (nn.Hardtanh(), -1, 1), (nn.Hardtanh(-0.5, 0.25), -0.5, 0.25)],
)
def test_case_95_bounds_of_a_fused_clamp(activation, low, high, check):
    model = nn.Sequential(linear(), activation, linear())
    with torch.no_grad():
        model[0].weight.mul_(8)
    qmodel = expand(check(model, X, others=[(OTHER,)]))
    (node,) = [n for n in qmodel.graph.nodes if n.target is torch.ops.fxq.qlinear.default]
    scale, zero = node.meta["qparams"]
    assert node.args[-3] == zero
    assert node.args[-2] == max(0, round(low / scale) + zero)
    assert node.args[-1] == (255 if high is None else min(255, round(high / scale) + zero))


def test_case_96_no_bias(check):
    qmodel = check(nn.Sequential(linear(bias=False), nn.ReLU(), linear(bias=False)), X + 3, others=[(OTHER + 3,)])
    assert all_linears_int8(qmodel)
    assert expand(qmodel).get_buffer("0.bias_i32").abs().max() > 0  # the zero point's part


def test_case_97_weights_are_symmetric(staged):
    layer = linear(8, 8)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([-128.0, 127, 64, -64, 0, 1, -1, 100]) / 128
    quantized = []
    for sign in (1, -1):
        model = copy.deepcopy(layer)
        with torch.no_grad():
            model.weight.mul_(sign)
        gm, _ = staged(nn.Sequential(model), X, "lower")
        quantized.append(next(t for name, t in gm.named_buffers() if t.dtype == torch.int8))
    assert quantized[0].min() == -127
    assert torch.equal(quantized[0], -quantized[1])


def test_case_98_calibration_data(model_of):
    model = model_of(lambda s, x: s.l(x), l=linear())
    reference = fxq.quantize(model, X, calibration_data=[X, OTHER])(X)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([X, OTHER]), torch.zeros(len(X) + len(OTHER))), batch_size=16
    )
    for data in ((x for x in (X, OTHER)), [(X,), (OTHER,)], [{"x": X}, {"x": OTHER}], [(X, 0), (OTHER, 1)]):
        if isinstance(data, list) and isinstance(data[0], dict):
            assert torch.equal(fxq.quantize(model, {"x": X}, calibration_data=data)(X), reference)
        else:
            assert torch.equal(fxq.quantize(model, X, calibration_data=data)(X), reference)
    assert output_sqnr(model(X), fxq.quantize(model, X, calibration_data=loader)(X)) > 30
    exhausted = iter([X])
    next(exhausted)
    with pytest.raises(fxq.CalibrationError, match="empty"):
        fxq.quantize(model, X, calibration_data=exhausted)


def test_case_99_threads_do_not_change_bits(tmp_path):
    model = nn.Sequential(linear(8, 128), nn.ReLU(), linear(128, 128), nn.ReLU(), linear(128, 8)).eval()
    x = normal(300, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(2)
        qmodel = fxq.quantize(model, x)
        fxq.save(qmodel, tmp_path / "model.fxq")
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results += [qmodel(x), fxq.load(tmp_path / "model.fxq")(x)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_case_100_global_settings(check):
    model = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    qmodel = check(model, X)
    expected = qmodel(X)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_flush_denormal(True)
        assert torch.equal(qmodel(X), expected)
        assert torch.equal(fxq.quantize(model, X)(X), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.sum().mean(0, keepdim=True) + x,
        lambda self, x: x.sum().transpose(0, -1) * self.linear(x),
        lambda self, x: self.linear(x) + x.sum().flatten(0),
        lambda self, x: self.linear(x) + x.amax().flatten(),
    ],
    ids=["mean", "transpose", "flatten from", "flatten"],
)
def test_moves_of_what_has_no_dimensions(forward, model_of):
    x = torch.randn(4, 6)
    model = model_of(forward, linear=torch.nn.Linear(6, 6))
    qmodel = fxq.quantize(model, x, recipe=fxq.Recipe(modules={"linear": fxq.FLOAT}), progress=False)
    assert torch.allclose(qmodel(x), model(x), atol=0.2)


def test_a_path_that_code_cannot_have(model_of):
    parts = nn.ModuleDict({"in": nn.Linear(6, 6), "out": nn.Linear(6, 6)})
    model = model_of(lambda self, x: self.parts["out"](self.parts["in"](x)), parts=parts)
    with pytest.raises(fxq.TraceError, match=r"'parts\.in.*' has a word of Python's in its path.*name it otherwise"):
        fxq.quantize(model, torch.randn(4, 6))
