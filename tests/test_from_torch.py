"""Import of what torch.ao has quantized: its integers with exact=, one step at most without, and clear refusals."""

import copy

import numpy as np
import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxq
from fxq import kernels, numerics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*must run observer before calling calculate_qparams:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*FixedQParamsObserver doesn't calculate:UserWarning"),
]
ENGINES = ["fbgemm", "onednn", "qnnpack"]


@pytest.fixture(params=ENGINES)
def engine(request):
    """One of torch's engines, in use."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


def weight_of(w, scheme):
    """w as torch quantizes it: per tensor or per channel, with zero points or without."""
    if scheme == "per_tensor":
        return torch.quantize_per_tensor(w, w.abs().max().item() / 120, 0, torch.qint8)
    if scheme == "per_tensor_affine":
        return torch.quantize_per_tensor(w, w.abs().max().item() / 120, 5, torch.qint8)
    scales = w.abs().amax(1).double() / 120
    zero_points = torch.zeros(len(w), dtype=torch.int64)
    if scheme == "per_channel_affine":
        zero_points = torch.randint(-100, 100, (len(w),))
    return torch.quantize_per_channel(w, scales, zero_points, 0, torch.qint8)


def affine_convolution(groups, relu):
    """Quantize, a convolution of 8 channels whose weights have zero points far from 0, DeQuantize."""
    torch.manual_seed(groups)
    layer = (nniq.ConvReLU2d if relu else nnq.Conv2d)(8, 8, 3, groups=groups, padding=1)
    scales, zero_points = torch.rand(8).double() * 0.01 + 0.005, torch.randint(-110, 110, (8,))
    w = (torch.randint(-128, 128, (8, 8 // groups, 3, 3)) - zero_points.view(-1, 1, 1, 1)) * scales.view(-1, 1, 1, 1)
    layer.set_weight_bias(torch.quantize_per_channel(w.float(), scales, zero_points, 0, torch.qint8), torch.randn(8))
    layer.scale, layer.zero_point = 0.2, 128
    return nn.Sequential(nnq.Quantize(0.02, 117, torch.quint8), layer, nnq.DeQuantize()).eval()


class OneLayer(nn.Module):
    """Quantize, one quantized linear, DeQuantize."""

    def __init__(self, k, n, scheme, relu=False, bias=True, s_x=0.0173, s_y=0.0631):
        super().__init__()
        self.quant = nnq.Quantize(s_x, 117, torch.quint8)
        self.fc = (nniq.LinearReLU if relu else nnq.Linear)(k, n)
        self.fc.set_weight_bias(weight_of(torch.randn(n, k) * 0.3, scheme), torch.randn(n) if bias else None)
        self.fc.scale, self.fc.zero_point = s_y, 93
        self.dequant = nnq.DeQuantize()

    def forward(self, x):
        return self.dequant(self.fc(self.quant(x)))


class TestExact:
    @pytest.fixture(autouse=True)
    def _needs_vnni(self):
        if "vnni" not in " ".join(kernels.info().available):
            pytest.skip("the sums of torch's engines saturate here")

    @pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_tensor_affine", "per_channel_affine"])
    def test_a_million_outputs(self, engine, scheme):
        if engine == "onednn" and scheme.endswith("affine"):
            pytest.skip("onednn refuses weights with zero points")
        differences = 0
        for k, relu, bias in ((67, False, True), (33, True, True), (128, False, False), (50, False, True)):
            s_x, s_y = torch.rand(2).tolist()
            model = OneLayer(k, 128, scheme, relu, bias, 0.01 + 0.02 * s_x, 0.05 + 0.05 * s_y).eval()
            qmodel = fxq.from_torch(model, torch.randn(4, k), exact=engine)
            x = torch.randn(2100, k)
            differences += int((qmodel(x) != model(x)).sum())
        assert differences == 0  # of 4 * 2100 * 128, more than a million

    def test_networks(self, engine):
        model = eager(engine)
        qmodel = fxq.from_torch(model, X, exact=engine, check=True)
        assert torch.equal(qmodel(X), model(X))
        assert f"all {len(X) * 3} outputs on the examples are those of torch's {engine}" in str(fxq.report(qmodel))
        assert fxq.report(qmodel).int8_share == 1

    def test_mul_and_cat(self, engine):
        model = functional(engine, "mul_cat")
        qmodel = fxq.from_torch(model, X, exact=engine)
        assert torch.equal(qmodel(X), model(X))

    def test_the_golden_model_has_the_integers(self, engine):
        model = eager(engine)
        qmodel = fxq.from_torch(model, X, exact=engine)
        assert np.array_equal(fxq.golden(qmodel)(X.numpy()), model(X).numpy())

    def test_a_million_sums_and_products(self, engine):
        """Every pair of integers, at scales of which half make many ties."""
        a, b = (grid.flatten().to(torch.uint8) for grid in torch.meshgrid(*[torch.arange(256)] * 2, indexing="ij"))
        outputs = 0
        for case in range(6):
            scales = (2.0 ** torch.randint(-7, -3, (3,))).tolist() if case % 2 else (torch.rand(3) / 9).tolist()
            (s_a, s_b, s_y), (z_a, z_b, z_y) = scales, torch.randint(0, 255, (3,)).tolist()
            x = (
                torch._make_per_tensor_quantized_tensor(a, s_a, z_a),
                torch._make_per_tensor_quantized_tensor(b, s_b, z_b),
            )
            for relu in (False, True):
                add = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add
                y = numerics.qadd_engine(a.numpy(), b.numpy(), s_a, z_a, s_b, z_b, s_y, z_y, relu, engine)
                assert np.array_equal(y, add(*x, s_y, z_y).int_repr().numpy())
                mul = torch.ops.quantized.mul_relu if relu else torch.ops.quantized.mul
                multiplier = numerics.qmul_multiplier(s_a, s_b, s_y)
                y = numerics.qmul(a.numpy(), b.numpy(), multiplier, z_a, z_b, z_y, z_y if relu else 0, 255)
                assert np.array_equal(y, mul(*x, s_y, z_y).int_repr().numpy())
                outputs += 2 * len(a)
        assert outputs > 1e6

    def test_a_million_pixels(self, engine):
        """Of convolutions of each kind, one with a residual behind it, and of the averages of all pixels."""
        model = statically(tq.fuse_modules(Images().eval(), [["c1", "r1"], ["c3", "r3"]]), engine, x=IMAGES)
        qmodel = fxq.from_torch(model, IMAGES[:2], exact=engine, check=True)
        assert qmodel.report.int8_share == 1
        outputs = 0
        for _ in range(4):
            x = torch.randn(64, 3, 34, 34)
            found, wanted = qmodel(x), model(x)
            assert all(map(torch.equal, found, wanted))
            outputs += sum(y.numel() for y in wanted)
        assert outputs > 1e6
        golden = fxq.golden(qmodel)(x[:2].numpy())
        assert all(np.array_equal(a, b[:2].numpy()) for a, b in zip(golden, wanted, strict=True))

    def test_what_saturates_is_refused(self):
        """fbgemm's depthwise kernel adds two products in 16 bits, whatever the processor."""
        layer = nnq.Conv2d(8, 8, 3, groups=8, padding=1)
        model = nn.Sequential(nnq.Quantize(0.02, 128, torch.quint8), layer, nnq.DeQuantize())
        for most, fits in ((60, True), (127, False)):
            w = torch.randint(-most, most + 1, (8, 1, 3, 3)) * 0.01
            layer.set_weight_bias(torch.quantize_per_tensor(w, 0.01, 0, torch.qint8), torch.randn(8))
            x = 2 * torch.randn(4, 8, 16, 16)
            if fits:
                assert torch.equal(fxq.from_torch(model, x, exact="fbgemm")(x), model(x))
                continue
            with pytest.raises(fxq.QuantizationError, match=r"1 \(.*exact='fbgemm' does not cover this depthwise"):
                fxq.from_torch(model, x, exact="fbgemm")
            assert fxq.from_torch(model, x, exact="onednn").report.int8_share == 1

    def test_a_million_pixels_of_affine_weights(self, engine):
        """A zero point for each channel; what leaves int8 multiplies the same pixels twice, group by group."""
        if engine == "onednn":
            pytest.skip("onednn refuses weights with zero points")
        x, outputs = 2 * torch.randn(8, 8, 40, 40), 0
        for groups, relu in ((1, False), (2, True), (4, False)):
            model = affine_convolution(groups, relu)
            qmodel = fxq.from_torch(model, x, exact=engine)
            assert qmodel.report.int8_share == 1
            for own in (x, 0.3 * torch.randn(64, 8, 40, 40)):
                assert torch.equal(qmodel(own), model(own))
                outputs += own.numel()
        assert outputs > 1e6

    def test_affine_depthwise_is_refused_by_fbgemm(self):
        model, x = affine_convolution(8, False), torch.randn(2, 8, 9, 9)
        with pytest.raises(fxq.QuantizationError, match=r"1 \(.*depthwise convolution whose weights have zero points"):
            fxq.from_torch(model, x, exact="fbgemm")
        assert fxq.from_torch(model, x).report.int8_share == 1

    @pytest.mark.parametrize(
        "average", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), lambda x: x.mean((2, 3)), lambda x: x.mean((2, 3), True)]
    )
    def test_averages_that_depend_on_memory_are_refused(self, engine, average, model_of):
        model = model_of(lambda s, x: average(s.q(x)).dequantize(), q=nnq.Quantize(0.02, 128, torch.quint8))
        with pytest.raises(fxq.QuantizationError, match="exact= covers no average but an adaptive pool to one pixel"):
            fxq.from_torch(model, IMAGES, exact=engine)


X = torch.randn(512, 8)


class Net(nn.Module):
    """The forum's network with a fused layer more."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.fc1, self.relu1 = nn.Linear(8, 16), nn.ReLU()
        self.fc2, self.relu2, self.drop, self.fc3 = nn.Linear(16, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)

    def forward(self, x):
        x = self.relu1(self.fc1(self.quant(x)))
        x = self.relu2(self.fc2(x)).reshape(-1, 2, 16).transpose(0, 1).flatten(0, 1)
        return self.dequant(self.fc3(self.drop(x)))


class Functions(nn.Module):
    """QFunctionals: a residual, or a product and a cat."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16 if kind == "mul_cat" else 8, 3)
        self.f, self.g = nnq.FloatFunctional(), nnq.FloatFunctional()

    def forward(self, x):
        x = self.quant(x)
        a, b = self.a(x), self.b(x)
        if self.kind == "mul_cat":
            return self.dequant(self.c(self.f.cat([self.g.mul(a, b), a], 1)))
        return self.dequant(self.c(self.f.add_relu(self.g.add(a, b), x)))


IMAGES = torch.randn(8, 3, 34, 34)


class Images(nn.Module):
    """Convolutions dense, in groups, strided, dilated and pointwise, a residual, a maximum, a product and averages."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.c1, self.r1, self.c2 = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 1)
        self.c3, self.r3 = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4), nn.ReLU()
        self.add, self.mul = nnq.FloatFunctional(), nnq.FloatFunctional()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.r1(self.c1(self.quant(x)))
        x = F.max_pool2d(self.add.add(self.r3(self.c3(x)), self.c2(x)), 3, 1, 1)
        y = self.fc(self.pool(x).flatten(1))
        return self.dequant(self.mul.mul(x, x)), self.dequant(y)


def statically(model, engine, train=False, x=X):
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        if train:
            model.train().qconfig = tq.get_default_qat_qconfig(engine)
            prepared = tq.prepare_qat(model)
        else:
            model.eval().qconfig = tq.get_default_qconfig(engine)
            prepared = tq.prepare(model)
        prepared(x)
        return tq.convert(prepared.eval())
    finally:
        torch.backends.quantized.engine = before


def eager(engine, train=False):
    torch.manual_seed(4)
    net = Net().train(train)
    fuse = tq.fuse_modules_qat if train else tq.fuse_modules
    return statically(fuse(net, [["fc2", "relu2"]]), engine, train)


def functional(engine, kind):
    torch.manual_seed(4)
    return statically(Functions(kind), engine)


class TestContract:
    @pytest.mark.parametrize("train", [False, True], ids=["ptq", "qat"])
    def test_eager(self, train, fingerprint):
        model = eager("x86", train)
        before = [(n, type(m)) for n, m in model.named_modules()]
        qmodel = fxq.from_torch(model, X, check=True)
        assert [(n, type(m)) for n, m in model.named_modules()] == before
        close(qmodel, model, step=model.fc3.scale)
        forms = {d.module: d.form for d in qmodel.report.decisions if d.module}
        assert forms == {"fc1": "int8", "relu1": "moved", "fc2": "int8", "fc3": "int8"}
        assert qmodel.report.int8_share == 1
        assert "dequantize" not in " ".join(str(n.target) for n in list(qmodel.graph.nodes)[:-3])

    @pytest.mark.parametrize("kind", ["add", "mul_cat"])
    def test_functions(self, kind):
        model = functional("x86", kind)
        close(fxq.from_torch(model, X, check=True), model, step=model.c.scale)

    @pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share:UserWarning")
    @pytest.mark.parametrize("prepare", [prepare_fx, prepare_qat_fx])
    def test_fx(self, prepare, model_of):
        model = model_of(
            lambda s, x: torch.cat([F.relu(s.a(x)), s.b(x) + s.a(x)], 1),
            a=nn.Linear(8, 8), b=nn.Sequential(nn.Linear(8, 8), nn.ReLU6()),
        )  # fmt: skip
        if prepare is prepare_qat_fx:
            model.train()
            mapping = tq.get_default_qat_qconfig_mapping("x86")
        else:
            mapping = tq.get_default_qconfig_mapping("x86")
        prepared = prepare(model, mapping, (X,))
        prepared(X)
        converted = convert_fx(prepared.eval())
        qmodel = fxq.from_torch(converted, X, check=True)
        with torch.no_grad():
            wanted = converted(X)
            assert (qmodel(X) - wanted).abs().max() < 0.02 * wanted.abs().max()
        assert qmodel.report.int8_share == 1

    @pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_affine"])
    def test_weights_with_zero_points(self, scheme):
        """Against the formula, in integers: y = s_x * s_w * (sum (q_x - z_x) * (q_w - z_w)) + b."""
        model = OneLayer(20, 12, scheme)
        qmodel = fxq.from_torch(model, X.new_ones(2, 20))
        x = torch.randn(64, 20)
        weight = model.fc.weight()
        q_x = numbers(x)
        w = weight.dequantize().double().numpy()
        y = 0.0173 * (q_x - 117.0) @ w.T + model.fc.bias().detach().double().numpy()
        assert np.abs(qmodel(x).numpy() - np.clip(y, -93 * 0.0631, 162 * 0.0631)).max() < 0.51 * 0.0631
        close(qmodel, model, step=0.0631, x=x)

    def test_convolutions(self):
        class Images(nn.Module):
            def __init__(self):
                super().__init__()
                self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
                self.c1, self.r1 = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU()
                self.c2, self.pool = nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1)
                self.fc = nn.Linear(8, 3)

            def forward(self, x):
                x = F.max_pool2d(self.r1(self.c1(self.quant(x))), 2)
                return self.dequant(self.fc(self.pool(self.c2(x)).flatten(1)))

        torch.manual_seed(4)
        x = torch.randn(64, 3, 16, 16)
        model = statically(tq.fuse_modules(Images().eval(), [["c1", "r1"]]), "x86", x=x)
        qmodel = fxq.from_torch(model, x)
        close(qmodel, model, step=model.fc.scale, x=x)
        assert [d.module for d in qmodel.report.decisions if d.macs and d.form == "int8"] == ["c1", "c2", "fc"]
        assert np.array_equal(fxq.golden(qmodel)(x.numpy()), qmodel(x).numpy())

    def test_other_batches_copies_and_files(self, tmp_path):
        model = eager("x86")
        for exact in (None, "fbgemm"):
            qmodel = fxq.from_torch(model, X, exact=exact)
            fxq.save(qmodel, tmp_path / "model.fxq")
            for rows in (2, 34):
                y = qmodel(X[:rows])
                assert y.shape == (rows, 3)
                assert torch.equal(copy.deepcopy(qmodel)(X[:rows]), y)
                assert torch.equal(fxq.load(tmp_path / "model.fxq")(X[:rows]), y)

    def test_a_float_part(self, model_of):
        """What is dequantized may go anywhere."""
        inner = OneLayer(8, 8, "per_channel")
        model = model_of(lambda s, x: torch.softmax(s.outer(s.inner(x)), -1), inner=inner, outer=nn.Linear(8, 3))
        qmodel = fxq.from_torch(model, X)
        assert (qmodel(X) - model(X)).abs().max() < 0.02
        assert {d.module: d.form for d in qmodel.report.decisions}["outer"] == "float"

    def test_dump(self, tmp_path):
        fxq.from_torch(eager("x86"), X, dump=tmp_path)
        assert any("import-quantized" in path.name for path in tmp_path.iterdir())


def numbers(x):
    return torch.quantize_per_tensor(x, 0.0173, 117, torch.quint8).int_repr().double().numpy()


def close(qmodel, model, step, x=X):
    """At most one step apart, and rarely: a difference in an early layer may become one of two steps in the last."""
    with torch.no_grad():
        steps = ((qmodel(x) - model(x)) / step).abs()
    assert steps.max() < 2.1
    assert (steps > 0.5).float().mean() < 0.03


class TestRefusals:
    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (lambda: nnq.ConvTranspose2d(1, 2, 3), r"0: ConvTranspose2d has no form here"),
            (lambda: nnq.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), r"0: it pads with 'reflect'"),
            (lambda: nnq.Embedding(4, 8), r"0: Embedding has no form here"),
            (lambda: nnq.EmbeddingBag(4, 8), r"0: EmbeddingBag has no form here"),
            (
                lambda: nnq.Quantize(0.1, 0, torch.qint8),
                r"0: Quantize to torch\.qint8; activations must be torch\.qu",
            ),
            (lambda: nnq.Hardswish(0.1, 0), "0: Hardswish has no form here"),
            (lambda: tq.FakeQuantize(), "0: FakeQuantize is not converted yet"),
            (lambda: tq.MinMaxObserver(), "0: MinMaxObserver is not converted yet"),
        ],
    )
    def test_modules(self, module, message):
        with pytest.raises(fxq.QuantizationError, match=message):
            fxq.from_torch(nn.Sequential(module()), X)

    def test_a_module_still_in_training(self):
        qconfig = tq.get_default_qat_qconfig("x86")
        model = nn.Sequential(tq.QuantStub(), nni.LinearReLU(nn.Linear(8, 3), nn.ReLU())).train()
        model.qconfig = qconfig
        with pytest.raises(fxq.QuantizationError, match="1: LinearReLU is not converted yet"):
            fxq.from_torch(tq.prepare_qat(model).eval(), X)

    def test_an_operation_on_integers(self, model_of):
        model = model_of(lambda s, x: torch.sigmoid(s.q(x)), q=nnq.Quantize(0.1, 0, torch.quint8))
        with pytest.raises(fxq.QuantizationError, match=r"sigmoid reads the quantized .* and has no integer form"):
            fxq.from_torch(model, X)

    def test_a_product_of_floats(self, model_of):
        layer = OneLayer(8, 3, "per_channel")
        model = model_of(lambda s, x: s.fc(torch.relu(x)), fc=layer.fc)
        with pytest.raises(fxq.QuantizationError, match=r"fc \(%fc\) takes quantized tensors, and %relu is not"):
            fxq.from_torch(model, X)

    def test_a_float_model(self):
        with pytest.raises(fxq.QuantizationError, match="it holds no quantized module"):
            fxq.from_torch(nn.Sequential(nn.Linear(8, 3)), X)

    def test_an_unknown_engine(self):
        with pytest.raises(fxq.InputError, match="exact is 'x86'; there are None, 'fbgemm', 'onednn', 'qnnpack'"):
            fxq.from_torch(OneLayer(8, 3, "per_channel"), X, exact="x86")

    def test_a_function(self, model_of):
        model = model_of(lambda s, x: s.a(x) * 2, a=nn.Linear(8, 8))
        prepared = prepare_fx(model, tq.get_default_qconfig_mapping("x86"), (X,))
        prepared(X)
        with pytest.raises(fxq.QuantizationError, match=r"%mul.* calls quantized\.mul; it takes Quantize"):
            fxq.from_torch(convert_fx(prepared), X)

    def test_methods_of_a_functional(self, model_of):
        f = nnq.QFunctional()
        model = model_of(lambda s, x: s.f.add_scalar(s.q(x), 2), q=nnq.Quantize(0.1, 0, torch.quint8), f=f)
        with pytest.raises(fxq.FxqError, match=r"QFunctional\.add_scalar is not supported"):
            fxq.from_torch(model, X)


def test_compare_finds_the_layers_by_their_modules():
    """The imported graph is not that of the float model; a relu that torch has fused is compared behind the relu."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(64, 8)
    prepared = prepare_fx(copy.deepcopy(model), tq.get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    comparison = fxq.compare(model, fxq.from_torch(convert_fx(prepared), x), x)
    layers = {layer.module: layer for layer in comparison.layers if "qlinear" in layer.op}
    assert set(layers) == {"0", "2", "4"}
    assert all(layer.alone > 25 and layer.accumulated > 25 for layer in layers.values())


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped", "depthwise"])
def test_affine_weights_in_fixed_point(kind, rounding, monkeypatch):
    """Integers alone, from weights with zero points: NumPy's on every instruction set, a step off torch's at most."""
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")  # fbgemm's depthwise sums saturate
    groups = {"linear": 0, "convolution": 1, "grouped": 2, "depthwise": 8}[kind]
    model = affine_convolution(groups, False) if groups else OneLayer(33, 8, "per_channel_affine").eval()
    x = torch.randn(2, 8, 6, 5) if groups else torch.randn(40, 33)
    qmodel = fxq.from_torch(model, x, requant="fixed", rounding=rounding, check=True)
    report = fxq.report(qmodel)
    assert report.recipe == f"torch's own, requant fixed, rounding {rounding}" and report.float_steps == []
    expected = fxq.golden(qmodel)(x.numpy())
    for isa in kernels.info().available:
        with kernels.use_isa(isa):
            assert np.array_equal(qmodel(x).numpy(), expected)
    layer = model.fc if kind == "linear" else model[1]
    steps = (torch.from_numpy(expected) - model(x)).abs() / layer.scale
    assert steps.max() < 1.01 and (steps > 0.5).double().mean() < 0.02


def test_fixed_point_is_no_engine_of_torch():
    with pytest.raises(fxq.InputError, match="fbgemm multiplies by floats; give requant='fixed' without exact"):
        fxq.from_torch(OneLayer(4, 2, "per_tensor"), torch.randn(2, 4), exact="fbgemm", requant="fixed")


def test_a_graph_without_anything_quantized_is_refused():
    exported = torch.export.export(nn.Linear(8, 4).eval(), (torch.randn(3, 8),)).module()
    with pytest.raises(fxq.QuantizationError, match="it holds no quantized module"):
        fxq.from_torch(exported, torch.randn(3, 8))


def test_a_quantized_output_is_refused():
    x = torch.randn(3, 8)
    model = nn.Sequential(tq.QuantStub(), nn.Linear(8, 4)).eval()
    model.qconfig = tq.get_default_qconfig("fbgemm")
    tq.prepare(model, inplace=True)(x)
    with pytest.raises(fxq.InputError, match="returns a quantized tensor; let it end with torch's DeQuantStub"):
        fxq.from_torch(tq.convert(model), x)


def test_a_weight_that_torch_does_not_give_away(monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    x = torch.randn(2, 4, 5, 5, 5)
    model = nn.Sequential(tq.QuantStub(), nn.Conv3d(4, 4, 3), tq.DeQuantStub()).eval()
    model.qconfig = tq.get_default_qconfig("qnnpack")
    tq.prepare(model, inplace=True)(x)
    with pytest.raises(fxq.QuantizationError, match=r"1: torch does not give its weight away \(QNNPACK only supports"):
        fxq.from_torch(tq.convert(model), x)
