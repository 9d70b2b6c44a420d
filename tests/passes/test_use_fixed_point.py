"""use_fixed_point: requantization by integers alone, and what remains float by name."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import kernels
from fxq.expansion import expand
from fxq.ops.fixed_point import requantize_fixed
from fxq.pipeline import run
from fxq.qdq import dequantize, quantize
from fxq.recipe import Recipe
from passes import lower, use_fixed_point

X = torch.randn(64, 8)
FIXED = Recipe(requant="fixed", balance=False)
TFLITE = Recipe(requant="fixed", rounding="tflite", balance=False)


def residual(model_of):
    layers = {name: nn.Linear(8, 8) for name in "abc"}
    return model_of(lambda s, x: s.c(F.relu(s.a(x)) + s.b(F.relu(s.a(x)))), **layers)


def test_before_and_after(staged, text, model_of):
    gm, ctx = staged(residual(model_of), X, "use-fixed-point", FIXED)
    before = text(gm)
    run((use_fixed_point.PASS,), gm, ctx)
    after = text(gm)
    assert [before.count(f"fxq.{op}(") for op in ("qlinear", "qadd", "qlinear_float")] == [3, 1, 1]
    assert [after.count(f"fxq.{op}(") for op in ("qlinear", "qadd", "qlinear_float")] == [0, 0, 1]
    assert [after.count(f"fxq.{op}(") for op in ("qlinear_fixed", "qadd_fixed")] == [3, 1]
    assert after.count("'single')") == 3
    assert ctx.report.float_steps == []
    assert use_fixed_point.PASS.run(gm, ctx) == 0


def test_without_the_recipe_nothing_happens(staged, text, model_of):
    gm, ctx = staged(residual(model_of), X, "use-fixed-point")
    before = text(gm)
    assert use_fixed_point.PASS.run(gm, ctx) == 0
    assert text(gm) == before


def same(actual, expected):
    pairs = zip(*(torch.utils._pytree.tree_leaves(value) for value in (actual, expected)), strict=True)
    return all(np.array_equal(torch.as_tensor(x).numpy(), y) for x, y in pairs)


def test_every_model_of_the_zoo_has_the_bits_of_numpy(zoo):
    qmodel = fxq.quantize(zoo.model, zoo.inputs, recipe=FIXED, on_low_sqnr="ignore")
    assert "fxq.qlinear(" not in qmodel.code
    if zoo.name == "in_place":
        pytest.skip("a golden model works out of place")
    golden = fxq.golden(qmodel, islands="torch")
    assert same(qmodel(*zoo.inputs), golden(*(x.numpy() for x in zoo.inputs)))


@pytest.mark.parametrize("recipe", [FIXED, TFLITE], ids=["single", "tflite"])
def test_a_model_has_the_bits_of_numpy_on_every_isa(model_of, recipe):
    model = residual(model_of)
    qmodel = fxq.quantize(model, X, recipe=recipe, check=True)
    expected = fxq.golden(qmodel)(X.numpy())
    for isa in kernels.info().available:
        with kernels.use_isa(isa):
            assert same(qmodel(X), expected)
    in_float = fxq.quantize(model, X, recipe=Recipe(balance=False))
    assert fxq.report(qmodel).sqnr > fxq.report(in_float).sqnr - 1


def test_requantize_where_two_scales_meet(staged):
    """No pass of today's leaves such a pair; a graph that has one must still be right."""
    gm, ctx = staged(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), X, "lower", FIXED)
    first = next(node for node in gm.graph.nodes if node.target is dequantize)
    with gm.graph.inserting_after(first):
        again = gm.graph.call_function(quantize, (first, 0.05, 100))
        again.meta = {**first.meta, "qparams": (0.05, 100)}
    with gm.graph.inserting_after(again):
        back = gm.graph.call_function(dequantize, (again, 0.05, 100))
        back.meta = dict(first.meta)
    for reader in [user for user in first.users if user is not again]:
        reader.replace_input_with(first, back)
    run((lower.PASS, use_fixed_point.PASS), gm, ctx)
    (node,) = [node for node in gm.graph.nodes if node.target is requantize_fixed]
    multiplier, shift = node.args[2:4]
    assert multiplier * 2.0**-shift == pytest.approx(first.args[1] / 0.05, rel=2**-30)
    assert node.args[4:] == (100, 0, 255, "single")


def test_a_relu_and_a_clamp_cost_nothing(model_of):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 3))
    qmodel = fxq.quantize(model.eval(), X, recipe=FIXED, strict=True)
    assert "relu" not in qmodel.code and "clamp" not in qmodel.code
    assert fxq.report(qmodel).sqnr > 25


@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_with_one_scale_for_its_weight(convolution):
    model, x = nn.Sequential(convolution(3, 8, 3), nn.ReLU(), convolution(8, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    qmodel = fxq.quantize(model, x, recipe=Recipe(requant="fixed", weight="per_tensor"), strict=True)
    assert same(qmodel(x), fxq.golden(qmodel)(x.numpy()))


def test_the_report_names_what_remains_float(model_of):
    model = model_of(lambda s, x: s.b(F.softmax(F.gelu(s.a(x)), -1)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    qmodel = fxq.quantize(model, X, recipe=FIXED, on_low_sqnr="ignore")
    report = fxq.report(qmodel)
    assert [step.partition("  ")[2].partition(":")[0] for step in report.float_steps] == ["gelu", "softmax"]
    assert report.float_steps[1].endswith("softmax: it takes exponentials and divides by what each row adds up to")
    assert "float arithmetic between the quantized inputs and the dequantized outputs: 2 operations" in str(report)
    assert type(report).from_dict(report.to_dict()).float_steps == report.float_steps
    trained = fxq.report(fxq.convert(fxq.prepare_qat(model, X, recipe=FIXED)))
    assert trained.recipe == report.recipe and "dequantized outputs: 2 operations" in str(trained)
    with pytest.raises(
        fxq.QuantizationError, match=r"2 operations between the model's edges compute in float:\n.*gelu"
    ):
        fxq.quantize(model, X, recipe=FIXED, strict=True)


def test_a_value_that_is_output_and_read_by_a_layer_is_named(model_of):
    """It becomes float32 for the output, and is quantized again for the layer."""

    def forward(s, x):
        y = s.a(x)
        return y, s.b(y)

    model = model_of(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    steps = fxq.report(fxq.quantize(model, X, recipe=FIXED)).float_steps
    assert [step.partition("  ")[2].partition(":")[0] for step in steps] == ["fxq.quantize"]
    assert steps[0].endswith("an output of the model reads the same value in float32")


def test_a_bias_that_stays_float_is_named(model_of):
    model = model_of(lambda s, x: s.b(s.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    with torch.no_grad():
        model.a.weight.mul_(1e-9)
        model.a.bias.add_(100)
    steps = fxq.report(fxq.quantize(model, X, recipe=FIXED, on_low_sqnr="ignore")).float_steps
    assert any("qlinear_float" in step for step in steps)
    assert "no operation" in str(fxq.report(fxq.quantize(nn.Linear(8, 8).eval(), X, recipe=FIXED)))


def test_report_draw_compare_save(tmp_path, model_of):
    model = residual(model_of)
    qmodel = fxq.quantize(model, X, recipe=FIXED, dump=tmp_path / "dump")
    assert "recipe w8a8, requant fixed, rounding single" in str(fxq.report(qmodel))
    ops = [layer.op for layer in fxq.compare(model, qmodel, X).layers]
    assert ops.count("fxq.qlinear_fixed") == 3 and "fxq.qadd_fixed" in ops
    assert "qlinear_fixed" in fxq.draw(qmodel, tmp_path / "model.dot").read_text()
    fxq.save(qmodel, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq")
    again = copy.deepcopy(qmodel)
    again.load_state_dict(qmodel.state_dict())
    for other in (loaded, again):
        assert torch.equal(other(X[:5]), qmodel(X[:5]))
    assert not any(t.is_floating_point() for name, t in qmodel.state_dict().items() if not name.startswith("c."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requant": "int"}, "unknown requant 'int'; there are float, fixed"),
        ({"requant": "fixed", "rounding": "up"}, "unknown rounding 'up'; there are single, tflite"),
        ({"rounding": "tflite"}, "give requant='fixed' with it"),
    ],
)
def test_recipes_that_make_no_sense(options, message):
    with pytest.raises(fxq.RecipeError, match=message):
        Recipe(**options)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x):
        return torch.relu(x + self.depthwise(torch.relu(self.norm(self.conv(x)))))


def cnn():
    torch.manual_seed(2)
    front = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU6(), nn.MaxPool2d(2), Block(8), nn.AvgPool2d(2, padding=1)
    back = nn.Conv2d(8, 20, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*front, *back, nn.Linear(20, 5)).eval()


IMAGES = torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("recipe", [FIXED, TFLITE], ids=["single", "tflite"])
def test_a_convolutional_network_is_integer_only(recipe, tmp_path):
    qmodel = fxq.quantize(cnn(), IMAGES, recipe=recipe, strict=True, check=True)
    assert fxq.report(qmodel).float_steps == []
    assert fxq.report(qmodel).sqnr > 35
    names = [str(node.target).split(".")[1] for node in expand(qmodel).graph.nodes if "fxq." in str(node.target)]
    assert names == [
        *("quantize_channels_last", "qconv_fixed", "qmax_pool", "qconv_fixed", "qconv_fixed", "qadd_fixed"),
        *("qavg_pool_fixed", "qconv_fixed", "qupsample_nearest", "qadaptive_avg_pool_fixed", "qlinear_float"),
    ]
    floats = [name for name, tensor in expand(qmodel).state_dict().items() if tensor.is_floating_point()]
    assert len(floats) == 1 and floats[0].startswith("10.") and floats[0].endswith("multiplier")
    golden = fxq.golden(qmodel)
    expected = golden(IMAGES.numpy())
    for isa in kernels.info().available:
        with kernels.use_isa(isa):
            assert same(qmodel(IMAGES), expected)
            assert same(qmodel(IMAGES[:1]), expected[:1])
    fxq.save(qmodel, tmp_path / "model.fxq")
    assert torch.equal(fxq.load(tmp_path / "model.fxq")(IMAGES[:3]), qmodel(IMAGES[:3]))
    arrays = np.load(golden.dump(tmp_path / "files", IMAGES[:1].numpy()) / "arrays.npz")
    assert arrays["0.weight"].shape == (8, 3, 3, 3)
    assert arrays["0.multiplier_shift" if "0.multiplier_shift" in arrays else "0.shift"].dtype == np.int32


def decoder(model_of):
    """Transposed convolutions, a bilinear image, a product of images, a gate, and a function of both signs."""

    def forward(s, x):
        y = F.interpolate(s.a(x), scale_factor=2, mode="bilinear")
        y = F.avg_pool2d(y, 2, divisor_override=3) * s.c(x)
        y = torch.relu(s.up(y)) * torch.sigmoid(s.gate(F.adaptive_avg_pool2d(y, 1)))
        large = F.interpolate(y, size=(45, 51), mode="bilinear", align_corners=True)
        return s.last(torch.cat([F.hardswish(s.b(large)), large], 1))

    convs = {"a": nn.Conv2d(3, 4, 1), "c": nn.Conv2d(3, 4, 1), "gate": nn.Conv2d(4, 6, 1)}
    convs |= {"up": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), "b": nn.Conv2d(6, 6, 1)}
    return model_of(forward, **convs, last=nn.ConvTranspose2d(12, 2, 2))


@pytest.mark.parametrize("recipe", [FIXED, TFLITE], ids=["single", "tflite"])
def test_a_decoder_is_integer_only(model_of, recipe, tmp_path):
    model = decoder(model_of)
    qmodel = fxq.quantize(model, IMAGES, recipe=recipe, strict=True, check=True)
    assert fxq.report(qmodel).float_steps == []
    names = [str(node.target).split(".")[1] for node in expand(qmodel).graph.nodes if "fxq." in str(node.target)]
    for op, count in (("qupsample_bilinear_fixed", 2), ("qmul_fixed", 2), ("qconv_transpose_fixed", 1)):
        assert names.count(op) == count
    floats = [name for name, tensor in expand(qmodel).state_dict().items() if tensor.is_floating_point()]
    assert len(floats) == 1 and floats[0].startswith("last.")
    golden = fxq.golden(qmodel)
    expected = golden(IMAGES.numpy())
    for isa in kernels.info().available:
        with kernels.use_isa(isa):
            assert same(qmodel(IMAGES), expected)
    in_float = fxq.quantize(model, IMAGES, recipe=Recipe(balance=False))
    assert fxq.report(qmodel).sqnr > fxq.report(in_float).sqnr - 1
    fxq.save(qmodel, tmp_path / "model.fxq")
    assert torch.equal(fxq.load(tmp_path / "model.fxq")(IMAGES[:3]), qmodel(IMAGES[:3]))


def test_the_files_of_a_decoder_hold_its_multipliers(model_of, tmp_path):
    golden = fxq.golden(fxq.quantize(decoder(model_of), IMAGES, recipe=FIXED))
    folder = golden.dump(tmp_path / "files", IMAGES[:1].numpy())
    arrays = np.load(folder / "arrays.npz")
    layers = {layer["op"]: layer for layer in json.loads((folder / "manifest.json").read_text())["layers"]}
    up = layers["fxq.qconv_transpose_fixed"]["operands"]
    multiplier, shift = (arrays[up[name]["array"]] for name in ("multiplier", "shift"))
    assert multiplier.dtype == shift.dtype == np.int32 and multiplier.shape == shift.shape == (6,)
    assert arrays["up.weight"].shape == (6, 4, 3, 3)
    inside = {entry["array"] for entry in layers["fxq.qconv_transpose_fixed"]["inside"]}
    assert "up.acc+bias" in inside
    result = arrays[layers["fxq.qconv_transpose_fixed"]["result"]["array"]]
    sums, right = arrays["up.acc+bias"].astype(np.int64), shift[:, None, None].astype(np.int64)
    steps = (sums * multiplier[:, None, None] + (1 << right >> 1)) >> right
    assert np.array_equal(np.clip(steps + up["zero_point"], up["low"], up["high"]), result)
    product = layers["fxq.qmul_fixed"]["operands"]
    assert 2**30 <= product["multiplier"] < 2**31 and 0 <= product["shift"] <= 62
    assert layers["fxq.qupsample_bilinear_fixed"]["operands"]["steps"] == [0, 0]


def test_a_divisor_that_integers_do_not_take_stays_float(model_of):
    pair = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1)}
    model = model_of(lambda s, x: s.b(F.avg_pool2d(s.a(x), 2, divisor_override=-4)), **pair)
    steps = fxq.report(fxq.quantize(model, IMAGES, recipe=FIXED)).float_steps
    assert [step.partition("  ")[2].partition(":")[0] for step in steps] == ["fxq.qavg_pool"]
    assert steps[0].endswith(": its divisor is not in 1..2**23")
