"""Models in the schemes beside w8a8: what works with one recipe works with all."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fxq
from fxq import kernels
from fxq.comparison import sqnr
from fxq.swapping import swap_linears

SCHEMES = ["w8a8-dynamic", "w8a32", "w8a16"]
OPS = {"w8a8-dynamic": "qlinear_dynamic", "w8a32": "linear_weight_only", "w8a16": "linear_weight_only"}
X = torch.randn(6, 16)


class Net(nn.Module):
    """A residual, epilogues, a weight that two layers share, a layer without bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.Linear(16, 24)
        self.c.weight = self.a.weight
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        y = x + self.b(torch.relu(self.a(x)))
        return self.head(nn.functional.gelu(self.c(y)))


def quantized(scheme, **options):
    torch.manual_seed(1)
    model = Net().eval()
    x = X
    if scheme == "w8a16":
        model, x = model.bfloat16(), X.bfloat16()
    return model, x, fxq.quantize(model, x, recipe=scheme, **options)


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def test_report_draw_dump_compare_save(scheme, tmp_path):
    model, x, qmodel = quantized(scheme, check=True, dump=tmp_path / "dump", strict=True)
    forms = {d.form for d in fxq.report(qmodel).decisions if d.macs}
    assert forms == {"int8" if scheme == "w8a8-dynamic" else "weight"}
    assert qmodel.code.count(f"fxq.{OPS[scheme]}.") == 4
    y = qmodel(x)
    assert y.dtype == x.dtype
    assert sqnr(model(x), y) > 25
    assert OPS[scheme] in fxq.draw(qmodel, tmp_path / "model.dot").read_text()
    assert fxq.compare(model, qmodel, x).output > 25
    fxq.save(qmodel, tmp_path / "model.fxq")
    again = copy.deepcopy(qmodel)
    again.load_state_dict(qmodel.state_dict())
    for other in (fxq.load(tmp_path / "model.fxq"), again, torch.compile(qmodel, backend="eager")):
        assert torch.equal(other(x[:3]), y[:3])
    floats = [t for t in qmodel.state_dict().values() if t.is_floating_point()]
    assert max(t.numel() for t in floats) <= 24  # scales and biases, and no weight


def test_golden(scheme):
    _, x, qmodel = quantized(scheme)
    if scheme == "w8a16":
        with pytest.raises(fxq.GoldenError, match="is bfloat16, which NumPy does not have"):
            fxq.golden(qmodel, islands="torch")
        return
    golden = fxq.golden(qmodel, islands="torch")
    for isa in kernels.info().available:
        with kernels.use_isa(isa):
            assert np.array_equal(golden(x.numpy()), qmodel(x).numpy())


def test_shapes_and_strides(scheme):
    _, x, qmodel = quantized(scheme)
    y = qmodel(x)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(qmodel(wide), y)
    assert torch.equal(qmodel(x.t().contiguous().t()), y)
    assert qmodel(x[:0]).shape == (0, 5)
    for leading in ((), (6,), (2, 3), (1, 2, 3), (1, 3, 1, 2)):
        own = x[0] if leading == () else x.reshape(*leading, 16)
        model, _, _ = quantized(scheme)
        found = fxq.quantize(model, own, recipe=scheme)(own)
        assert torch.equal(found.reshape(-1, 5), y[:1] if leading == () else y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_keep_to_themselves(scheme, value):
    _, x, qmodel = quantized(scheme)
    y = qmodel(x)
    mates = x.clone()
    mates[1, 3], mates[2], mates[3] = value, 0, mates[3] * 1000
    found = qmodel(mates)
    assert torch.equal(found[[0, 4, 5]], y[[0, 4, 5]])
    assert not found[1].isfinite().any()
    assert found[2].isfinite().all()


RECIPES = ["w8a8", *SCHEMES, fxq.Recipe(requant="fixed")]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_activations_of_another_dtype(recipe, dtype, tmp_path):
    """The error names the module, the input, both dtypes and the way out; also of a loaded model, and of hooks'."""
    _, x, qmodel = quantized(recipe)
    if dtype == x.dtype:
        return
    fxq.save(qmodel, tmp_path / "model.fxq")
    hooked = copy.deepcopy(qmodel)
    hooked.register_forward_pre_hook(lambda module, args: None)
    title = fxq.Recipe.of(recipe).title
    place = r"\(%\w+\): " if recipe in ("w8a8", RECIPES[-1]) else r"[abc] \(%\w+\): "
    for model in (qmodel, fxq.load(tmp_path / "model.fxq"), hooked):
        with pytest.raises(fxq.InputError, match=place + f"input 'x' has dtype {dtype}") as caught:
            model(x.to(dtype))
        assert f"quantized ({title}) for {x.dtype}: convert the input with .to({x.dtype})" in str(caught.value)
        assert ("w8a16" in str(caught.value).partition("convert")[2]) == (dtype in (torch.bfloat16, torch.float16))
        assert torch.isfinite(model(x)).all()


def test_activations_of_another_dtype_inside_and_by_keyword():
    """What a structure of inputs holds is named by the parameter; integers beside floats may be of any kind."""

    class Picker(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(5, 16), nn.Linear(16, 4)

        def forward(self, ids, extras):
            return self.fc(self.table(ids) + extras["more"])

    ids, x = torch.tensor([1, 2, 3]), torch.randn(3, 16)
    qmodel = fxq.quantize(Picker().eval(), {"ids": ids, "extras": {"more": x}}, recipe="w8a32")
    y = qmodel(ids=ids, extras={"more": x})
    assert torch.equal(qmodel(ids=ids.int(), extras={"more": x}), y)
    with pytest.raises(fxq.InputError, match=r"fc \(%\w+\): input 'extras' has dtype torch.float64"):
        qmodel(ids=ids, extras={"more": x.double()})
    with pytest.raises(RuntimeError, match=r"x\[3, 3\]|size"):  # another cause keeps its own words
        qmodel(ids=ids, extras={"more": x[:, :3]})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_swapped_layer_names_its_path(scheme):
    dtype, other = (torch.bfloat16, torch.float32) if scheme == "w8a16" else (torch.float32, torch.bfloat16)
    swapped, _ = swap_linears(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 4))).to(dtype), scheme)
    with pytest.raises(fxq.InputError, match=rf"1\.0 \(\w+\) takes activations of .*not of {other}; convert"):
        swapped(X.to(other))
    with pytest.raises(fxq.InputError, match=r"1\.0 \(\w+\) has no gradients"):
        swapped(X.to(dtype).requires_grad_()).sum().backward()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_gradients_are_refused(recipe):
    _, x, qmodel = quantized(recipe)
    with pytest.raises(fxq.InputError, match=r"\w \(%\w+\): input 'x' of an integer model has no gradients"):
        qmodel(x.clone().requires_grad_()).sum().backward()
    assert not any(p.requires_grad for p in qmodel.parameters())


def test_gradients_are_refused_where_they_stop():
    """Behind what stays float, at the first operation on integers."""

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(torch.sin(x))

    qmodel = fxq.quantize(Waves().eval(), X, recipe="w8a32")
    with pytest.raises(fxq.InputError, match=r"^fc \(%\w+\): input 'x' of an integer model has no gradients"):
        qmodel(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("call", [fxq.quantize, fxq.prepare, fxq.prepare_qat])
def test_an_unknown_recipe_lists_those_there_are(call):
    known = r"unknown recipe 'w4a4'; there are w8a8, w8a8-dynamic, w8a32, w8a16, float"
    with pytest.raises(fxq.RecipeError, match=known):
        call(nn.Linear(16, 4).eval(), X, recipe="w4a4")
    with pytest.raises(fxq.RecipeError, match=known):
        swap_linears(nn.Linear(16, 4), "w4a4")


@pytest.mark.parametrize("recipe", ["w8a8", *SCHEMES])
@pytest.mark.parametrize("features", [5, 8])
def test_rows_of_another_width_are_refused(recipe, features):
    model, x = nn.Sequential(nn.Linear(features, 3), nn.Softmax(-1)).eval(), torch.randn(4, 16)
    if recipe == "w8a16":
        model, x = model.bfloat16(), x.bfloat16()
    qmodel = fxq.quantize(model, x[:, :features], recipe=recipe)
    for width in set(range(1, 16)) - {features}:
        with pytest.raises(RuntimeError, match=rf"x\[4, {width}\]"):
            qmodel(x[:, :width])


def test_the_layers_compute_the_same(scheme):
    """`swap_linears` and `quantize` round weights alike, and call the same ops."""
    linear = nn.Linear(16, 5).to(torch.bfloat16 if scheme == "w8a16" else torch.float32)
    x = X.to(linear.weight.dtype)
    swapped, _ = swap_linears(nn.Sequential(linear), scheme)
    assert torch.equal(swapped(x), fxq.quantize(nn.Sequential(linear).eval(), x, recipe=scheme)(x))
