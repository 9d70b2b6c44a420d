"""A float graph in float64: nothing of it goes through float32, and nothing of the model changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import double
from fxq.double import Double, Runner, run
from fxq.inputs import Call
from fxq.observers import OBSERVERS, Edge

X = torch.randn(4, 6, 8)


def filled(s, x):
    y = torch.zeros(x.shape)
    y[:, 1:] = x[:, 1:] / 3
    y[0] += torch.arange(8.0) / 7
    return y


PROGRAMS = {
    "a linear, a norm": (lambda s, x: s.norm(s.linear(x)), {"norm": nn.LayerNorm(8), "linear": nn.Linear(8, 8)}),
    "an LSTM": (lambda s, x: s.lstm(x)[0], {"lstm": nn.LSTM(8, 4, bidirectional=True)}),
    "attention": (lambda s, x: s.mha(x, x, x)[0], {"mha": nn.MultiheadAttention(8, 2)}),
    "by a mask": (lambda s, x: F.scaled_dot_product_attention(x, x, x, torch.ones(6, 6).tril() - 1), {}),
    "a convolution in place": (lambda s, x: F.silu(s.conv(x), inplace=True), {"conv": nn.Conv1d(6, 6, 3)}),
    "a table": (lambda s, x: x / 3 + s.table(torch.arange(6)), {"table": nn.Embedding(6, 8)}),
    "dtypes by name": (lambda s, x: torch.softmax(x / 3, -1, dtype=torch.float32) + (x / 7).to(torch.float32), {}),
    "a method for a dtype": (lambda s, x: (x / 3).float().type(torch.float32) + x.new_ones(8, dtype=torch.float32), {}),
    "a dtype that is asked for": (lambda s, x: (x / 3).to(x.dtype) + torch.full((8,), 2, dtype=x.dtype) / 3, {}),
    "made and filled": (filled, {}),
    "complex": (lambda s, x: torch.view_as_real(torch.fft.fft(x / 3)), {}),
    "torch's own operators": (lambda s, x: torch.ops.aten.mul(x, 1 / 3) + torch.ops.aten.exp.default(x), {}),
    "its input": (lambda s, x: x.mul_(3) * (x / 3).abs(), {}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_number_is_rounded_to_float32(name, model_of):
    forward, members = PROGRAMS[name]
    model = model_of(forward, **copy.deepcopy(members))
    wide, x = copy.deepcopy(model).double(), (X * 64).round() / 64  # so that what is done to an input in place is exact
    gm = fxq.trace(model, x)
    before = {path: (tensor.data_ptr(), tensor.clone()) for path, tensor in gm.state_dict().items()}
    with torch.no_grad():
        expected = forward_in_double(wide, x)
        y = run(gm, Call((x.clone(),)), double=True)
    assert y.dtype == torch.float64
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    assert all(tensor.data_ptr() == before[path][0] for path, tensor in gm.state_dict().items())
    assert all(torch.equal(tensor, before[path][1]) for path, tensor in gm.state_dict().items())


def forward_in_double(model, x):
    """The program where float32 is another name of float64."""
    names = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        return model(x.double())
    finally:
        torch.float32, torch.Tensor.float = names
        torch.set_default_dtype(torch.float32)


CONVOLUTIONS = {
    "of signals": ((2, 3, 40), (5, 3, 7), (2,), (3,), (1,)),
    "of images": ((3, 4, 9, 12), (6, 4, 3, 2), (1, 2), (1, 0), (2, 1)),
    "of volumes": ((1, 2, 5, 6, 7), (3, 2, 2, 3, 1), (1, 1, 2), (0, 1, 0), (1, 1, 1)),
    "of no images": ((0, 4, 9, 9), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, bias, monkeypatch):
    shape, kernel, *settings = CONVOLUTIONS[name]
    x, w, b = torch.randn(shape), torch.randn(kernel), torch.randn(kernel[0]) if bias else None
    function = getattr(torch, f"conv{len(shape) - 2}d")
    expected = function(x.double(), w.double(), None if b is None else b.double(), *settings, 1)
    for at_once in (1, 500, double.AT_ONCE):
        monkeypatch.setattr(double, "AT_ONCE", at_once)
        with Double():
            y = function(x, w, b, *settings, 1)
        assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)


def test_code_that_asks_finds_float32():
    x, ids = torch.ones(3), torch.arange(3)
    with Double():
        y = x / 3
        assert (x.dtype, y.dtype, ids.dtype, (ids / 2).dtype) == (*[torch.float32] * 2, torch.int64, torch.float32)
    assert (x.dtype, y.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("bits", [lambda y: y.view(torch.int32), lambda y: y.view(dtype=torch.int32)])
def test_code_that_reads_bits_finds_those_of_float32(bits):
    x = torch.randn(4)
    with Double():
        read = bits(x * 3)
    assert torch.equal(read, (x * 3).view(torch.int32))


def test_what_is_moved_stays_where_it_is():
    w = torch.randn(6, 8)
    with Double():
        parts = w.t(), w[2:], w.view(3, 16), F.embedding(torch.tensor([1]), w), torch.cat([w, w])
    assert all(part.dtype == torch.float32 for part in parts)
    assert all(part.untyped_storage().data_ptr() == w.untyped_storage().data_ptr() for part in parts[:3])


def test_state_is_changed(model_of):
    def forward(self, x):
        self.count.add_(1)
        self.last[0] = x.sum()
        return x * self.count + self.last

    model = model_of(forward, count=torch.zeros(()), last=torch.zeros(1))
    gm = fxq.trace(model, X)
    y = run(gm, Call((X.clone(),)), double=True)
    assert (gm.count.dtype, gm.count.item(), gm.last.item()) == (torch.float32, 1, pytest.approx(X.sum().item()))
    assert torch.allclose(y.float(), X + X.sum())


@torch.library.custom_op("test_double::halve", mutates_args=())
def halve(x: torch.Tensor, factor: float) -> torch.Tensor:
    """As a kernel for float32 alone does."""
    assert x.dtype == torch.float32
    return x * factor


@halve.register_fake
def _(x, factor):
    return torch.empty_like(x)


class Own(nn.Module):
    """A module of the user's."""

    def forward(self, x):
        assert x.dtype == torch.float32
        return x.numpy().max() * x


def test_what_is_not_torchs_gets_float32(model_of):
    gm = fxq.trace(
        model_of(lambda s, x: s.own(torch.ops.test_double.halve(x / 3, 0.5)) / 3, own=Own()), X, leaves=(Own,)
    )
    y = run(gm, Call((X,)), double=True)
    assert y.dtype == torch.float64
    half = (X.double() / 3).float() * 0.5
    assert torch.equal(y, (half * half.max()).double() / 3)


def test_not_asked_for_nothing_changes(model_of):
    class Wide(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float64
            return x.numpy().max() * x

    gm = fxq.trace(model_of(lambda s, x: s.own(x.double() / 3), own=Wide()), X, leaves=(Wide,))
    assert torch.equal(Runner(gm, double=False).run(X), gm(X))


@pytest.mark.parametrize("observer", [*OBSERVERS.values(), Edge], ids=lambda kind: kind.__name__)
def test_observers_leave_what_they_see(observer):
    x = torch.randn(64, 8, dtype=torch.float64)
    seen = x.clone()
    watching = observer("here")
    assert watching(seen) is seen
    watching(seen * 2)
    assert torch.equal(seen, x)


METHODS = fxq.Recipe(reproducible=True, equalize=True, round_weights="adaround", correct_bias="analytic")


@pytest.mark.parametrize("recipe", [fxq.Recipe(reproducible=True), METHODS], ids=["default", "the other methods"])
def test_accuracy_is_the_same(recipe):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU()
    model = nn.Sequential(
        *convolutions, nn.Flatten(), nn.LayerNorm(256), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    plain = fxq.Recipe(judge_costs=False, equalize=recipe.equalize, round_weights=recipe.round_weights)
    reached = [
        fxq.quantize(model.eval(), data[0], calibration_data=data, recipe=each).report.sqnr for each in (recipe, plain)
    ]
    assert reached[0] == pytest.approx(reached[1], abs=1)
