"""fxq.nn and fxq.swap_linears; the known defects of TinyQ are tests by name."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.nn import LAYERS, W8A8Linear, W8A16Linear, W8A32Linear

KINDS = [(W8A32Linear, torch.float32), (W8A8Linear, torch.float32), (W8A16Linear, torch.bfloat16)]


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.tied = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.tied.weight = self.a.weight
        self.inner = nn.ModuleDict({"head": nn.Linear(16, 8), "own": Own(16, 16)})
        self.head = nn.Linear(16, 4)
        self.again = self.b

    def forward(self, x):
        x = self.again(self.b(self.tied(self.a(x).relu())))
        return self.head(self.inner["own"](x)), self.inner["head"](x)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(kind, dtype, bias):
    linear = nn.Linear(40, 30, bias=bias).to(dtype)
    layer, x = kind.from_float(linear), torch.randn(2, 5, 40).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 30))
    assert sqnr(linear(x), y) > 35
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), kind(40, 30, bias)):
        assert twin.load_state_dict(layer.state_dict()).missing_keys == []
        assert torch.equal(twin(x), y)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
    assert repr(layer) == f"{kind.__name__}(in_features=40, out_features=30, bias={bias})"
    assert not list(layer.parameters())
    assert layer.half().weight_scale.dtype == torch.float32
    with pytest.raises(fxq.InputError, match=f"{kind.__name__} takes activations of .*, not of torch.float64"):
        layer(x.double())


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_weights_that_do_not_fit(kind, dtype):
    with pytest.raises(fxq.InputError, match=f"{kind.__name__} takes a weight of .* not of torch.float64"):
        kind.from_float(nn.Linear(4, 4).double())
    linear = nn.Linear(4, 4).to(dtype)
    linear.weight.data[1, 1] = torch.nan
    with pytest.raises(fxq.InputError, match="NaN or infinity"):
        kind.from_float(linear)


@pytest.mark.parametrize("kind", [fxq.nn.W8A32Linear, fxq.nn.W8A16Linear, fxq.nn.W8A8Linear])
def test_what_a_layer_does_not_take(kind):
    """A number of features that the packed weight would hold, too; another type; gradients; another module."""
    dtype, other = kind.dtypes[0], torch.float16 if kind.dtypes[0] is torch.float32 else torch.float32
    layer = kind.from_float(nn.Linear(7, 3, dtype=dtype))
    for shape in ((2, 8), (2, 5), ()):
        with pytest.raises(fxq.InputError, match=rf"{kind.__name__} takes \[\.\.\., 7\], not"):
            layer(torch.zeros(shape, dtype=dtype))
    with pytest.raises(fxq.InputError, match=f"{kind.__name__} takes activations of {dtype}.*, not of {other}"):
        layer(torch.zeros(2, 7, dtype=other))
    x = torch.zeros(2, 7, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer(x.detach()))
    with pytest.raises(fxq.InputError, match=f"{kind.__name__} has no gradients"):
        y.sum().backward()
    with pytest.raises(fxq.InputError, match=r"from_float takes an nn\.Linear, not a Conv1d"):
        kind.from_float(nn.Conv1d(3, 3, 1))


def test_swap():
    model, x = Model().eval(), torch.randn(6, 16)
    swapped, report = fxq.swap_linears(model, fxq.Recipe("w8a32", modules={"b": fxq.Rule("w8a8-dynamic")}))
    assert all(sqnr(y, z) > 30 for y, z in zip(model(x), swapped(x), strict=True))
    assert (type(swapped.a), type(swapped.b), type(swapped.inner["own"])) == (W8A32Linear, W8A8Linear, Own)
    kept = {d.module: d.detail for d in report.kept_float()}
    assert kept == {"inner.own": "Own has a forward of its own"}
    assert report.weight_bytes[1] < report.weight_bytes[0]
    assert "fxq.swap_linears" in str(report)


def test_tinyq_scale_times_the_difference():
    """TinyQ: q * s + z where s * (q - z) is meant. Rows far from 0, on either side of it, show it."""
    linear = nn.Linear(32, 16)
    for offset in (100, 0, -1, -100):
        x = torch.randn(8, 32) + offset
        for kind in (W8A32Linear, W8A8Linear):
            assert sqnr(linear(x), kind.from_float(linear)(x)) > 25


def test_tinyq_zero_rows_are_not_nan():
    linear = nn.Linear(8, 4)
    linear.weight.data[2] = 0
    x = torch.randn(3, 8)
    x[1] = 0
    for kind in (W8A32Linear, W8A8Linear):
        layer = kind.from_float(linear)
        assert (layer.weight_scale > 0).all()
        y = layer(x)
        assert torch.equal(y[1], linear.bias)
        assert torch.equal(y[:, 2], linear.bias[2].expand(3))


def test_tinyq_no_float_copy_of_the_weight_is_kept():
    """That none is made in a call: tests/ops/test_linear_weight_only.py."""
    for layer in LAYERS.values():
        sizes = {name: (t.dtype, t.numel()) for name, t in layer(64, 64).state_dict().items()}
        assert [name for name, (dtype, count) in sizes.items() if count > 64] == ["weight_packed"]
        assert sizes["weight_packed"] == (torch.int8, 64 * 64)


def test_tinyq_exclusion_by_full_path():
    swapped, _ = fxq.swap_linears(Model(), fxq.Recipe("w8a32", modules={"head": fxq.FLOAT}))
    assert (type(swapped.head), type(swapped.inner["head"])) == (nn.Linear, W8A32Linear)
    swapped, _ = fxq.swap_linears(Model(), fxq.Recipe("w8a32", modules={"inner.*": fxq.FLOAT}))
    assert (type(swapped.head), type(swapped.inner["head"])) == (W8A32Linear, nn.Linear)


def test_tinyq_the_model_is_not_touched(fingerprint):
    model = Model()
    before = fingerprint(model)
    fxq.swap_linears(model)
    assert fingerprint(model) == before
    assert type(model.a) is nn.Linear


def test_tinyq_a_swapped_model_can_be_saved_and_loaded(tmp_path):
    x = torch.randn(6, 16)
    swapped, _ = fxq.swap_linears(Model(), "w8a8-dynamic")
    torch.save(swapped.state_dict(), tmp_path / "model.pt")
    other, _ = fxq.swap_linears(Model(), "w8a8-dynamic")
    assert not torch.equal(other(x)[0], swapped(x)[0])
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(x)[0], swapped(x)[0])


def test_tied_weights_stay_tied_and_shared_modules_shared():
    swapped, report = fxq.swap_linears(Model())
    assert swapped.a.weight_packed.data_ptr() == swapped.tied.weight_packed.data_ptr()
    assert swapped.a.bias.data_ptr() != swapped.tied.bias.data_ptr()
    assert swapped.b is swapped.again
    assert {"b", "again"} <= {d.module for d in report.decisions}


def test_the_model_itself_may_be_the_linear():
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    swapped, report = fxq.swap_linears(linear)
    assert type(swapped) is fxq.nn.W8A32Linear
    assert sqnr(linear(x), swapped(x)) > 35
    assert [d.form for d in report.decisions] == ["weight"]


def test_modules_that_read_the_weight_of_their_linears():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model, x = nn.Sequential(layer, nn.Linear(16, 4)), torch.randn(2, 5, 16)
    swapped, report = fxq.swap_linears(model)
    assert sqnr(model(x), swapped(x)) > 30
    assert {d.module for d in report.kept_float()} == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}


def test_hooks_and_parametrizations_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    model[0].register_forward_hook(lambda *_: None)
    swapped, report = fxq.swap_linears(model)
    assert not [m for m in swapped.modules() if type(m) is W8A32Linear]
    assert [d.detail for d in report.decisions] == [
        "it has hooks",
        "its weight is parametrized; remove the parametrization first",
    ]


def test_what_was_swapped_before_stays_and_is_reported():
    once, _ = fxq.swap_linears(Model(), fxq.Recipe("w8a8-dynamic", modules={"head": fxq.FLOAT}))
    twice, report = fxq.swap_linears(once)
    assert (type(twice.head), type(twice.a)) == (W8A32Linear, W8A8Linear)
    told = {d.module: (d.op, d.form, d.scheme, d.detail.partition(";")[0]) for d in report.decisions}
    assert told["head"] == ("Linear", "weight", "w8a32", "")
    assert told["a"] == ("W8A8Linear", "int8", "w8a8-dynamic", "it had int8 weights before")


@pytest.mark.parametrize("place", ["", "inner"])
@pytest.mark.parametrize("make", [fxq.quantize, fxq.prepare, fxq.prepare_qat])
def test_what_fxq_has_made_is_refused(make, place):
    made = make(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 8))
    model = nn.ModuleDict({"inner": made}) if place else made
    named = "module 'inner'" if place else "the model"
    with pytest.raises(fxq.InputError, match=f"^{named} is already (quantized|prepared) by fxq; "):
        fxq.swap_linears(model)


@pytest.mark.parametrize(
    ("make", "recipe", "error", "message"),
    [
        (Model, "w8a8", fxq.RecipeError, "no calibration data for w8a8"),
        (Model, "w4", fxq.RecipeError, "unknown recipe 'w4'"),
        (Model, fxq.Recipe("w8a32", modules={"hed": fxq.FLOAT}), fxq.RecipeError, "did you mean head"),
        (Model, "w8a16", fxq.InputError, r"^a: W8A16Linear takes a weight of torch.bfloat16 or .*not of torch.float32"),
        (lambda: Model().double(), "w8a32", fxq.InputError, r"^a: W8A32Linear takes .* not of torch.float64"),
    ],
)
def test_what_cannot_be_swapped(make, recipe, error, message):
    with pytest.raises(error, match=message):
        fxq.swap_linears(make(), recipe)
