"""Import of models of torch's quantize_dynamic: its very numbers with exact=, ranges per row without."""

import copy

import numpy as np
import pytest
import torch
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxq
from fxq import kernels, numerics
from fxq.comparison import sqnr
from fxq.ops.linear_dynamic_engine import qlinear_dynamic_engine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
]
X = torch.randn(64, 8)


@pytest.fixture(params=["fbgemm", "onednn", "qnnpack"])
def engine(request):
    """One of torch's engines, in use."""
    if "vnni" not in " ".join(kernels.info().available):
        pytest.skip("the sums of torch's engines saturate here")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


def layer(k, n, scheme="per_tensor", bias=True, relu=False):
    w = torch.randn(n, k) * 0.3
    if scheme.startswith("per_tensor"):
        w = torch.quantize_per_tensor(w, w.abs().max().item() / 120, 5 * scheme.endswith("affine"), torch.qint8)
    else:
        zero_points = torch.randint(-100, 100, (n,)) * scheme.endswith("affine")
        w = torch.quantize_per_channel(w, w.abs().amax(1).double() / 120, zero_points, 0, torch.qint8)
    module = (nniqd.LinearReLU if relu else nnqd.Linear)(k, n)
    module.set_weight_bias(w, torch.randn(n) if bias else None)
    return module.eval()


def network():
    torch.manual_seed(3)
    parts = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_tensor_affine", "per_channel_affine"])
def test_a_million_outputs(engine, scheme):
    if engine == "onednn" and scheme.endswith("affine"):
        pytest.skip("onednn refuses weights with zero points")
    differences = count = 0
    for k, n, relu, bias in (
        (67, 128, False, True),
        (33, 121, True, True),
        (128, 128, False, False),
        (1, 5, False, True),
    ):
        model = nn.Sequential(layer(k, n, scheme, bias, relu))
        qmodel = fxq.from_torch(model, torch.randn(4, k), exact=engine)
        for scale, offset in ((1.0, 0.0), (30.0, 50.0), (0.01, -0.02), (1e-4, 0.0), (1e-6, 1e-4)):
            x = torch.randn(550, k) * scale + offset
            differences += int((qmodel(x) != model(x)).sum())
            count += len(x) * n
    assert count > 1_000_000
    assert differences == 0


@pytest.mark.parametrize("zero_point", [0, 3, 42, 127])
def test_inputs_that_lie_between_two_steps(engine, zero_point):
    """Where fused and separate roundings, and those of a scale and its reciprocal, part."""
    model = nn.Sequential(layer(512, 4))
    qmodel = fxq.from_torch(model, torch.randn(4, 512), exact=engine)
    steps = 255 if engine == "qnnpack" else 127
    x = torch.randint(-2 * zero_point, 2 * (steps - zero_point) + 1, (64, 512)) * (0.0173 / 2)
    x = torch.where(torch.rand(64, 512) < 0.3, torch.nextafter(x, x + 1), x)
    x[0, :2] = torch.tensor([-zero_point * 0.0173, (steps - zero_point) * 0.0173])
    assert torch.equal(qmodel(x), model(x))


@pytest.mark.parametrize("value", [0.0, 1e-38, -3.0, 5e-7, -2e-3, 3e-3])
def test_rows_of_one_value(engine, value):
    """0.1 is the scale of nothing, and torch widens the range of next to nothing."""
    model = nn.Sequential(layer(8, 5))
    qmodel = fxq.from_torch(model, X, exact=engine)
    for x in (torch.full((2, 8), value), torch.full((2, 3, 8), value) * torch.tensor([1, -2.0] * 4), torch.zeros(0, 8)):
        assert torch.equal(qmodel(x), model(x))


def test_networks(engine, tmp_path):
    model = tq.quantize_dynamic(network())
    qmodel = fxq.from_torch(model, X, exact=engine, check=True, dump=tmp_path)
    assert torch.equal(qmodel(X), model(X))
    assert f"all {64 * 3} outputs on the examples are those of torch's {engine}" in str(fxq.report(qmodel))
    assert [(d.module, d.form, d.scheme) for d in qmodel.report.decisions if d.macs] == [
        (name, "int8", "w8a8-dynamic") for name in ("0", "2", "4")
    ]
    fxq.save(qmodel, tmp_path / "model.fxq")
    for twin in (copy.deepcopy(qmodel), fxq.load(tmp_path / "model.fxq"), torch.compile(qmodel, backend="eager")):
        assert torch.equal(twin(X[:5]), model(X[:5]))
    fxq.draw(qmodel, tmp_path / "model.dot")


def test_the_golden_model_has_the_numbers(engine):
    model = tq.quantize_dynamic(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval())
    golden = fxq.golden(fxq.from_torch(model, X, exact=engine))
    assert np.array_equal(golden(X.numpy()), model(X).numpy())
    assert {"x_q", "scale", "zero_point", "acc", "y"} <= {name.rpartition(".")[2] for name in golden.trace(X.numpy())}


def test_an_older_model_without_reduced_range(engine):
    model = nn.Sequential(layer(8, 5))
    model[0].version = 1
    qmodel = fxq.from_torch(model, X, exact=engine)
    assert torch.equal(qmodel(X), model(X))
    assert "255" in qmodel.code


class TestContract:
    """Without exact=: the scheme w8a8-dynamic with torch's weights."""

    def test_rows_have_ranges_of_their_own(self):
        model = tq.quantize_dynamic(network())
        qmodel = fxq.from_torch(model, X, check=True)
        assert sqnr(network()(X), qmodel(X)) > sqnr(network()(X), model(X)) > 20
        mates = X.clone()
        mates[1:] *= 1000
        assert torch.equal(qmodel(mates)[0], qmodel(X)[0])
        assert not torch.equal(model(mates)[0], model(X)[0])
        assert "outputs on the examples differ from those of torch's" in str(fxq.report(qmodel))
        assert np.array_equal(fxq.golden(fxq.from_torch(model[2:], X.repeat(1, 2)))(X.repeat(1, 2).numpy()),
                              fxq.from_torch(model[2:], X.repeat(1, 2))(X.repeat(1, 2)).numpy())  # fmt: skip

    @pytest.mark.parametrize("scheme", ["per_channel", "per_tensor_affine", "per_channel_affine"])
    def test_the_weights_are_torchs(self, scheme):
        module = layer(20, 12, scheme)
        x = torch.randn(16, 20)
        qmodel = fxq.from_torch(nn.Sequential(module), x)
        wanted = F.linear(torch.from_numpy(numerics.fake_quantize_rows(x.numpy())), module.weight().dequantize())
        assert torch.allclose(qmodel(x), wanted + module.bias(), atol=1e-5)

    def test_fx(self, model_of):
        model = model_of(lambda s, x: torch.relu(s.a(x)) + F.linear(x, s.w, s.v), a=nn.Linear(8, 8))
        model.w, model.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
        converted = convert_fx(prepare_fx(model.eval(), mapping, (X,)))
        assert [str(n.target) for n in converted.graph.nodes if "linear_dynamic" in str(n.target)]
        assert torch.equal(fxq.from_torch(converted, X, exact="fbgemm")(X), converted(X))
        qmodel = fxq.from_torch(converted, X, check=True)
        assert sqnr(model(X), qmodel(X)) > 30
        assert qmodel.report.int8_share == 1

    def test_beside_static_layers(self):
        static = nnq.Linear(8, 8)
        static.set_weight_bias(torch.quantize_per_tensor(torch.randn(8, 8), 0.02, 0, torch.qint8), torch.zeros(8))
        static.scale, static.zero_point = 0.05, 100
        model = nn.Sequential(nnq.Quantize(0.03, 128, torch.quint8), static, nnq.DeQuantize(), layer(8, 5))
        for exact in (None, "fbgemm"):
            assert sqnr(model(X), fxq.from_torch(model, X, exact=exact)(X)) > 30
        assert torch.equal(fxq.from_torch(model, X, exact="fbgemm")(X), model(X))


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                lambda: tq.quantize_dynamic(nn.Sequential(nn.Linear(8, 3)), dtype=torch.float16),
                "0: its weight is torch.fl",
            ),
            (lambda: tq.quantize_dynamic(nn.Sequential(nn.LSTM(8, 3))), "0: LSTM is quantized dynamically, which only"),
            (lambda: nn.Sequential(nnq.Quantize(0.1, 0, torch.quint8), layer(8, 3)), "takes float tensors, and %"),
        ],
    )
    def test_models(self, model, message):
        with pytest.raises(fxq.QuantizationError, match=message):
            fxq.from_torch(model(), X)

    def test_a_sum_that_leaves_int32(self):
        module = nnqd.Linear(70_000, 1)
        module.set_weight_bias(torch.quantize_per_tensor(torch.ones(1, 70_000), 1 / 127, 0, torch.qint8), None)
        with pytest.raises(fxq.QuantizationError, match="dot product of 70000 weights can leave int32"):
            fxq.from_torch(nn.Sequential(module), torch.zeros(1, 70_000), exact="fbgemm")

    def test_a_model_that_torch_cannot_run(self):
        model = tq.quantize_dynamic(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
        with pytest.raises(fxq.InputError, match="cannot run the model on the examples: 'function' object"):
            fxq.from_torch(model, X[None])


class TestOp:
    def operands(self, k=20, n=9):
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        sums = w.sum(1, dtype=torch.int32)
        return w, (torch.from_numpy(numerics.pack(w.numpy())), sums, torch.rand(n) + 0.1, torch.randn(n))

    @pytest.mark.parametrize("steps", [127, 255])
    @pytest.mark.parametrize("name", numerics.ENGINES)
    def test_against_numpy(self, isa, name, steps):
        w, operands = self.operands()
        for x in (torch.randn(2, 3, 20), torch.randn(20), torch.randn(20, 7).t(), torch.zeros(0, 20)):
            y = qlinear_dynamic_engine(x, *operands, name, steps)
            expected = numerics.qlinear_dynamic_engine(
                x.numpy(), w.numpy(), operands[2].numpy(), operands[3].numpy(), name, steps
            )
            assert np.array_equal(y.numpy(), expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_becomes_nan(self, value):
        _, operands = self.operands()
        x = torch.randn(3, 20)
        x[1, 1] = value
        assert qlinear_dynamic_engine(x, *operands, "fbgemm", 127).isnan().all()

    def test_opcheck_and_errors(self):
        x, (_, operands) = torch.randn(3, 20), self.operands()
        torch.library.opcheck(qlinear_dynamic_engine, (x, *operands, "qnnpack", 255))
        with pytest.raises(ValueError, match="unknown engine 'x86'; there are fbgemm, onednn, qnnpack"):
            qlinear_dynamic_engine(x, *operands, "x86", 255)
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
            qlinear_dynamic_engine(x.double(), *operands, "fbgemm", 255)
