"""`Recipe(outputs="uint8")`: the model's float32 outputs are integers, whatever they come from and are held in."""

import copy
import io
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.graph import target_name
from fxq.tracing.values import tensors

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
SEQ = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
UINT8 = fxq.Recipe(outputs="uint8", observer="min_max")  # the same few values are what it is judged by


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Record:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None


def linear(n=8, m=8):
    return nn.Linear(n, m)


def last(qmodel):
    """The operations that write what is returned, by output."""
    graph = fxq.expand(qmodel).graph
    return [target_name(n.target).removeprefix("fxq.") for n in graph.output_node().all_input_nodes]


MODELS = {
    "linear": (lambda s, x: s.l(x), X, ["qlinear"]),
    "relu, reshape": (lambda s, x: s.l(x).relu().reshape(-1), X, ["reshape"]),
    "gelu": (lambda s, x: F.gelu(s.l(x)), X, ["qlinear_act_quantize"]),
    "float island": (lambda s, x: s.l(x).softmax(-1), X, ["quantize"]),
    "add": (lambda s, x: s.k(s.l(x).relu()) + x, X, ["qadd"]),
    "norm": (lambda s, x: F.layer_norm(s.l(x) + x, (8,)), X, ["norm_quantize"]),
    "read in float as well": (lambda s, x: (lambda y: (y, y.softmax(-1)))(s.l(x)), X, ["quantize", "quantize"]),
    "read by a linear as well": (lambda s, x: (lambda y: (y, s.k(y)))(s.l(x)), X, ["qlinear", "qlinear"]),
    "containers": (lambda s, x: {"a": [s.l(x), None], "i": x.argmax(-1)}, X, ["qlinear", "argmax"]),
    "chunks": (lambda s, x: s.l(x).chunk(2, -1), X, ["getitem", "getitem"]),
    "named tuple": (lambda s, x: Pair(s.l(x), None), X, ["Pair"]),
    "dataclass": (lambda s, x: Record(s.k(s.l(x)), (s.l(x), x)), X, ["Record"]),
    "an input": (lambda s, x: (x, s.l(x)), X, ["quantize", "qlinear"]),
    "convolution": (lambda s, x: F.max_pool2d(s.c(x).relu(), 2), IMAGE, ["qmax_pool"]),
    "encoder": (lambda s, x: s.e(x), SEQ, ["norm_quantize"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_float_output_is_integers(name, model_of):
    forward, x, ops = MODELS[name]
    encoder = nn.TransformerEncoderLayer(16, 2, 32, 0, batch_first=True)
    model = model_of(forward, l=linear(), k=linear(), c=nn.Conv2d(3, 8, 3), e=encoder)
    qmodel = fxq.quantize(model, x, recipe=UINT8, check=True)
    assert last(qmodel) == ops
    with torch.no_grad():
        expected, actual = model(x), qmodel(x)
    assert [t.dtype for t in tensors(actual)] == [
        torch.uint8 if t.is_floating_point() else t.dtype for t in tensors(expected)
    ]
    real = qmodel.dequantize(actual)
    for t, q, r in zip(tensors(actual), qmodel.output_qparams, tensors(real), strict=True):
        assert r is t if q is None else torch.equal(r, (t.int() - q.zero_point).float() * q.scale)
    assert output_sqnr(expected, real) == pytest.approx(qmodel.report.sqnr, abs=0.01)
    assert qmodel.report.sqnr > 35
    assert fxq.compare(model, qmodel, x).output > 35
    golden = fxq.golden(qmodel, islands="torch")(x.numpy())
    arrays = [t.numpy() for t in tensors(actual)]
    assert all((a == b).all() for a, b in zip(arrays, arrays_in(golden), strict=True))


def arrays_in(value):
    leaves = torch.utils._pytree.tree_leaves(vars(value) if isinstance(value, Record) else value)
    return [leaf for leaf in leaves if hasattr(leaf, "dtype")]


def test_scale_and_zero_point_survive(tmp_path, model_of):
    qmodel = fxq.quantize(nn.Sequential(linear(), nn.ReLU(), linear()).eval(), X, recipe=UINT8)
    (known,) = qmodel.output_qparams
    assert f"output 0 is uint8, scale {known.scale:.6g}, zero point {known.zero_point}" in str(qmodel.report)
    assert "recipe w8a8, outputs uint8" in str(qmodel.report)
    fxq.save(qmodel, tmp_path / "model.fxq")
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(qmodel), fxq.load(tmp_path / "model.fxq"), torch.load(buffer, weights_only=False)):
        assert other.output_qparams == [known]
        assert torch.equal(other(X[:3]), qmodel(X[:3]))
    assert fxq.quantize(linear().eval(), X).output_qparams == [None]


def test_nothing_is_float_in_fixed_point():
    model = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    qmodel = fxq.quantize(model, X, recipe=fxq.Recipe(outputs="uint8", requant="fixed"), strict=True)
    assert last(qmodel) == ["qlinear_fixed"]
    assert qmodel(X).dtype == torch.uint8


def test_training_sees_the_rounding_of_the_output():
    model = nn.Sequential(linear(), nn.ReLU(), linear()).eval()
    prepared = fxq.prepare_qat(model, X, recipe=UINT8)
    with torch.no_grad():
        assert len(prepared.eval()(X).unique()) <= 256
    qmodel = fxq.convert(prepared)
    assert qmodel(X).dtype == torch.uint8
    assert output_sqnr(model(X), qmodel.dequantize(qmodel(X))) > 35


def test_what_a_leaf_reads_stays_float(model_of):
    def forward(self, x):
        y = self.l(x)
        return self.k(y * 2 if float(y.sum()) > 0 else y)

    model = model_of(forward, l=linear(), k=linear())
    qmodel = fxq.quantize(model, X, recipe=UINT8, frontend="leaf")
    assert {d.form for d in qmodel.report.decisions if d.op == "linear"} == {"int8"}
    assert qmodel(X).dtype == torch.uint8
    assert qmodel.report.sqnr > 35


def test_what_is_no_float32_stays_as_it_is(model_of):
    qmodel = fxq.quantize(model_of(lambda s, x: s.l(x).double(), l=linear()), X, recipe=UINT8)
    assert qmodel(X).dtype == torch.float64
    assert qmodel.output_qparams == [None]


def test_refusals(model_of):
    with pytest.raises(fxq.RecipeError, match="unknown outputs 'int8'; there are float32, uint8"):
        fxq.Recipe(outputs="int8")
    with pytest.raises(fxq.RecipeError, match="outputs='uint8' needs scales found by calibration"):
        fxq.Recipe("w8a32", outputs="uint8")
    with pytest.raises(
        fxq.CalibrationError, match=r"the output of .*test_outputs.py:\d+ \(%truediv\) holds NaN or inf"
    ):
        fxq.quantize(model_of(lambda s, x: s.l(x) / 0, l=linear()), X, recipe=UINT8)


def test_types_of_torchs_stay_as_they_are(model_of):
    model = model_of(lambda s, x: (s.l(x).max(-1), s.l(x)), l=linear())
    qmodel = fxq.quantize(model, X, recipe=UINT8)
    values, integers = qmodel(X)
    assert type(values) is torch.return_types.max
    assert [q is None for q in qmodel.output_qparams] == [True, True, False]
    assert qmodel.dequantize((values, integers))[1].dtype == torch.float32
    assert qmodel.report.sqnr > 35


def test_a_sparse_output(model_of):
    model, x = model_of(lambda s, x: s.l(x).relu().to_sparse(), l=nn.Linear(8, 4)), torch.randn(6, 8)
    qmodel = fxq.quantize(model, x)
    assert qmodel.report.sqnr > 30
    assert qmodel(x[:3]).layout is torch.sparse_coo
