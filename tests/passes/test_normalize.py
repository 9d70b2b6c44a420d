"""normalize: one spelling for every operation, with the same bits."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.pipeline import run
from passes import normalize

X = torch.randn(6, 8)
SEQ = torch.randn(2, 3, 8)
IMAGE = torch.randn(2, 3, 4, 8)
W, B = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))


@pytest.fixture
def normalized(staged, text):
    """The text of a model's graph after normalize, whose numbers were checked, and which a second run leaves alone."""

    def normalize_and_print(model, *inputs):
        gm, ctx = staged(model, inputs, "normalize")
        run((normalize.PASS,), gm, ctx)
        once = text(gm)
        assert normalize.PASS.run(gm, ctx) == 0
        assert text(gm) == once
        return once

    return normalize_and_print


LINEARS = {
    "module": (lambda s, x: s.l(x), "linear(x, l.weight, l.bias)"),
    "positional": (lambda s, x: F.linear(x, s.w, s.b), "linear(x, w, b)"),
    "keywords": (lambda s, x: F.linear(bias=s.b, input=x, weight=s.w), "linear(x, w, b)"),
    "without bias": (lambda s, x: F.linear(x, s.w), "linear(x, w, None)"),
    "t": (lambda s, x: x @ s.w.t(), "linear(x, w, None)"),
    "T": (lambda s, x: x @ s.w.T, "linear(x, w, None)"),
    "mT": (lambda s, x: torch.matmul(x, s.w.mT), "linear(x, w, None)"),
    "transpose": (lambda s, x: torch.mm(x, s.w.transpose(1, 0)), "linear(x, w, None)"),
    "permute": (lambda s, x: x.matmul(s.w.permute(1, 0)), "linear(x, w, None)"),
    "plain": (lambda s, x: x @ s.w, "linear(x, w_t, None)"),
    "matmul keywords": (lambda s, x: torch.matmul(other=s.w, input=x), "linear(x, w_t, None)"),
    "mm keywords": (lambda s, x: torch.mm(mat2=s.w, input=x), "linear(x, w_t, None)"),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w), "linear(x, w_t, b)"),
    "addmm of t": (lambda s, x: torch.addmm(s.b, x, s.w.t(), beta=1, alpha=1), "linear(x, w, b)"),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linears(name, model_of, normalized):
    forward, expected = LINEARS[name]
    model = model_of(forward, l=nn.Linear(8, 8), w=W, b=B)
    assert normalized(model, X) == f"%0 = {expected}\nreturn %0"


NOT_LINEARS = {
    "addmm with beta": lambda s, x: torch.addmm(s.b, x, s.w, beta=2),
    "addmm with alpha": lambda s, x: torch.addmm(s.b, x, s.w, alpha=0.5),
    "addmm with one bias for all": lambda s, x: torch.addmm(s.one, x, s.w),
    "addmm with a matrix": lambda s, x: torch.addmm(x, x, s.w),
    "constant on the left": lambda s, x: s.w @ x.t(),
    "two tensors": lambda s, x: x @ x.t(),
    "three dimensions": lambda s, x: x @ s.three,
    "vector": lambda s, x: x @ s.b,
    "permuted to itself": lambda s, x: x @ s.w.permute(0, 1).sin(),
}


@pytest.mark.parametrize("name", NOT_LINEARS)
def test_what_is_no_linear(name, model_of, normalized):
    members = {"w": W, "b": B, "one": nn.Parameter(torch.randn(1)), "three": nn.Parameter(torch.randn(2, 8, 8))}
    assert "linear" not in normalized(model_of(NOT_LINEARS[name], **members), X)


def test_a_transposed_weight_does_not_take_the_name_of_the_users(model_of, normalized):
    model = model_of(lambda s, x: x @ s.w + F.linear(x, s.w_t), w=W, w_t=torch.randn(8, 8))
    expected = "%0 = linear(x, w_t_1, None)\n%1 = linear(x, w_t, None)\n%2 = add(%0, %1)\nreturn %2"
    assert normalized(model, X) == expected


def test_a_weight_is_transposed_once(model_of, normalized):
    model = model_of(lambda s, x: x @ s.w @ s.w, w=W)
    assert normalized(model, X) == "%0 = linear(x, w_t, None)\n%1 = linear(%0, w_t, None)\nreturn %1"


CLAMPS = {
    "nn.ReLU": (lambda s, x: s.relu(x), "relu(x)"),
    "nn.ReLU in place": (lambda s, x: s.relu_(x.neg()), "relu(%0)"),
    "F.relu": (lambda s, x: F.relu(x), "relu(x)"),
    "F.relu in place": (lambda s, x: F.relu(x.neg(), inplace=True), "relu(%0)"),
    "F.relu_": (lambda s, x: F.relu_(x.neg()), "relu(%0)"),
    "torch.relu": (lambda s, x: torch.relu(x), "relu(x)"),
    "torch.relu_": (lambda s, x: torch.relu_(x.neg()), "relu(%0)"),
    "x.relu": (lambda s, x: x.relu(), "relu(x)"),
    "x.relu_": (lambda s, x: x.neg().relu_(), "relu(%0)"),
    "clamp(min=0)": (lambda s, x: x.clamp(min=0), "relu(x)"),
    "clamp_min(0)": (lambda s, x: torch.clamp_min(x, 0.0), "relu(x)"),
    "clip(0)": (lambda s, x: torch.clip(x, 0), "relu(x)"),
    "clamp(a, b)": (lambda s, x: x.clamp(-1, 0.5), "clamp(x, -1, 0.5)"),
    "clamp_(max)": (lambda s, x: x.neg().clamp_(max=0.5), "clamp(%0, None, 0.5)"),
    "clamp_max": (lambda s, x: x.clamp_max(0.5), "clamp(x, None, 0.5)"),
    "nn.ReLU6": (lambda s, x: s.relu6(x), "clamp(x, 0, 6)"),
    "F.relu6": (lambda s, x: F.relu6(x), "clamp(x, 0, 6)"),
    "nn.Hardtanh": (lambda s, x: s.hardtanh(x), "clamp(x, -2, 1)"),
    "F.hardtanh": (lambda s, x: F.hardtanh(x, max_val=0.5), "clamp(x, -1, 0.5)"),
    "integers": (lambda s, x: x.long().clamp(min=0.0), "clamp(%0, 0, None)"),
    "tensor bound": (lambda s, x: x.clamp(min=s.b), "clamp(x, b, None)"),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps(name, model_of, normalized):
    forward, expected = CLAMPS[name]
    modules = {"relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-2, 1)}
    found = normalized(model_of(forward, b=B, **modules), X)
    assert found.splitlines()[-2].partition(" = ")[2] == expected


MOVES = {
    "view": (lambda s, x: x.view(3, -1), "reshape(x, (3, -1))"),
    "view of a size": (lambda s, x: x.view((3, -1)), "reshape(x, (3, -1))"),
    "reshape": (lambda s, x: torch.reshape(input=x, shape=(3, -1)), "reshape(x, (3, -1))"),
    "flatten": (lambda s, x: x.flatten(1), "flatten(x, 1, -1)"),
    "nn.Flatten": (lambda s, x: s.flatten(x), "flatten(x, 1, -1)"),
    "unflatten": (lambda s, x: x.unflatten(1, (2, 4)), "unflatten(x, 1, (2, 4))"),
    "squeeze": (lambda s, x: x.squeeze(1), "squeeze(x, 1)"),
    "unsqueeze": (lambda s, x: x.unsqueeze(dim=1), "unsqueeze(x, 1)"),
    "t": (lambda s, x: x.t(), "transpose(x, 0, 1)"),
    "T": (lambda s, x: x.T, "permute(x, (1, 0))"),
    "swapaxes": (lambda s, x: x.swapaxes(0, 1), "transpose(x, 0, 1)"),
    "permute": (lambda s, x: x.permute(1, 0), "permute(x, (1, 0))"),
    "permute of a tuple": (lambda s, x: torch.permute(x, dims=(1, 0)), "permute(x, (1, 0))"),
    "movedim": (lambda s, x: torch.movedim(x, source=0, destination=1), "movedim(x, 0, 1)"),
    "flip": (lambda s, x: x.flip(0, 1), "flip(x, (0, 1))"),
    "flip with a keyword": (lambda s, x: torch.flip(x, dims=(1,)), "flip(x, (1,))"),
    "tile": (lambda s, x: torch.tile(x, dims=(2, 1)), "tile(x, (2, 1))"),
    "cat": (lambda s, x: torch.cat(dim=1, tensors=[x, x]), "cat([x, x], 1)"),
    "concat": (lambda s, x: torch.concat([x, x]), "cat([x, x], 0)"),
    "stack": (lambda s, x: torch.stack((x, x), dim=1), "stack((x, x), 1)"),
    "select": (lambda s, x: x.select(0, 1), "select(x, 0, 1)"),
    "narrow": (lambda s, x: x.narrow(dim=1, start=2, length=3), "narrow(x, 1, 2, 3)"),
    "max_pool1d": (lambda s, x: F.max_pool1d(x, 2), "max_pool1d(x, 2, 2, 0, 1, False)"),
    "nn.MaxPool1d": (lambda s, x: s.pool1(x), "max_pool1d(x, 3, 2, 1, 1, False)"),
    "add": (lambda s, x: x + x, "add(x, x)"),
    "x.add": (lambda s, x: x.add(other=x), "add(x, x)"),
    "add with alpha 1": (lambda s, x: torch.add(x, x, alpha=1), "add(x, x)"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name, model_of, normalized):
    forward, expected = MOVES[name]
    model = model_of(forward, flatten=nn.Flatten(), pool1=nn.MaxPool1d(3, 2, 1))
    assert normalized(model, X) == f"%0 = {expected}\nreturn %0"


def test_pools_of_pictures(model_of, normalized):
    model = model_of(lambda s, x: s.p(F.max_pool2d(x, (1, 2))), p=nn.MaxPool2d(2, stride=1, padding=1, ceil_mode=True))
    assert normalized(model, IMAGE) == (
        "%0 = max_pool2d(x, (1, 2), (1, 2), (0, 0), (1, 1), False)\n"
        "%1 = max_pool2d(%0, (2, 2), (1, 1), (1, 1), (1, 1), True)\n"
        "return %1"
    )


def test_pixel_shuffle(model_of, normalized):
    model = model_of(lambda s, x: F.pixel_unshuffle(s.p(x), downscale_factor=2), p=nn.PixelShuffle(2))
    expected = "%0 = pixel_shuffle(x, 2)\n%1 = pixel_unshuffle(%0, 2)\nreturn %1"
    assert normalized(model, torch.randn(1, 4, 2, 2)) == expected


@pytest.mark.parametrize(
    "spelling", [lambda x: x.split(4, 1), lambda x: torch.split(x, split_size_or_sections=4, dim=1)]
)
def test_splits(spelling, model_of, normalized):
    first = normalized(model_of(lambda s, x: spelling(x)[0]), X).splitlines()[0]
    assert first == "%0 = split(x, 4, 1)"


def test_nothings_go(model_of, normalized):
    def forward(self, x):
        x = F.dropout(self.d(self.i(x)), 0.1, self.training)
        return x.contiguous().detach().float().to(torch.float32).type_as(x)

    assert normalized(model_of(forward, d=nn.Dropout(), i=nn.Identity()), X) == "return x"


def test_conversions_stay(model_of, normalized):
    found = normalized(model_of(lambda s, x: x.double().to(torch.float32)), X)
    assert found == "%0 = .double(x)\n%1 = .to(%0, torch.float32)\nreturn %1"


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.add(x, x, alpha=2),
        lambda s, x: 1 + x,
        lambda s, x: operator.iadd(x.neg(), x.double()),  # in place the sum stays float32
        lambda s, x: F.max_pool1d(x, 2, return_indices=True)[0],
        lambda s, x: x.view(torch.int32),
        lambda s, x: F.batch_norm(x, None, None, training=True),
    ],
)
def test_what_has_no_spelling_keeps_its_own(forward, model_of, staged, text):
    gm, ctx = staged(model_of(forward), (X,), "normalize")
    before = text(gm)
    run((normalize.PASS,), gm, ctx)
    changed = text(gm)
    assert "= add(x, x)" not in changed
    assert "max_pool1d(x, 2, 2, 0, 1, False)" not in changed
    assert "reshape" not in changed
    assert len(before.splitlines()) >= len(changed.splitlines())


def in_place(self, x):
    y = self.l(x)
    y.relu_()
    y += x
    return y


def test_in_place_becomes_out_of_place_where_nobody_sees(model_of, normalized):
    expected = "%0 = linear(x, l.weight, l.bias)\n%1 = relu(%0)\n%2 = add(%1, x)\nreturn %2"
    assert normalized(model_of(in_place, l=nn.Linear(8, 8)), X) == expected


def test_both_readers_see_what_was_done_in_place(model_of, normalized):
    def forward(self, x):
        y = self.l(x)
        r = F.relu_(y)
        return y + r

    expected = "%0 = linear(x, l.weight, l.bias)\n%1 = relu(%0)\n%2 = add(%1, %1)\nreturn %2"
    assert normalized(model_of(forward, l=nn.Linear(8, 8)), X) == expected


def through_a_view(self, x):
    y = self.l(x)
    y[:, :4].relu_()
    return y


def view_read_later(self, x):
    y = self.l(x)
    v = y.view(-1, 4)
    y.relu_()
    return v


def write_an_item(self, x):
    y = self.l(x)
    y[:, 0] = 0
    return y


def write_the_input(self, x):
    x.relu_()
    return self.l(x)


def write_a_buffer(self, x):
    self.seen.add_(1)
    return self.l(x) + self.seen


@pytest.mark.parametrize("forward", [through_a_view, view_read_later, write_an_item, write_the_input, write_a_buffer])
def test_memory_that_others_see_is_left_alone_and_marked(forward, model_of, staged):
    gm, ctx = staged(model_of(forward, l=nn.Linear(8, 8), seen=torch.zeros(1)), (X,), "normalize")
    run((normalize.PASS,), gm, ctx)  # checks that outputs are the same bits
    assert any("aliases" in node.meta for node in gm.graph.nodes)
    assert [node.target for node in gm.graph.nodes].count(F.linear) == 1


def test_all_of_the_zoo(zoo, normalized):
    normalized(zoo.model, *zoo.inputs)


def test_a_weight_that_the_model_modifies_is_no_constant(model_of, normalized):
    def forward(self, x):
        self.w.add_(1)
        return x @ self.w, x @ self.w.t()

    assert "linear" not in normalized(model_of(forward, w=torch.randn(8, 8)), X)
