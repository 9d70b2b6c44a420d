"""What libraries of models do, written down small: each model here stands for one that failed once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.decisions import Reason


def check(model, x, least=20):
    """Quantized, and close to the model with one row, with more, and on other data."""
    qmodel = fxq.quantize(model.eval(), x, recipe=fxq.Recipe(judge_costs=False))
    for rows in (len(x), 1, len(x) + 1):
        y = torch.randn(rows, *x.shape[1:])
        with torch.no_grad():
            assert output_sqnr(model(y), qmodel(y)) > least
    return qmodel


def test_branches_summed_in_place_behind_an_identity(model_of):
    """MobileOne: batch norms by function, summed in place, through a drop path that drops nothing."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        y += F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=1e-3)
        y = self.drop(y)
        y += 0
        return y.relu_()

    rows = {name: torch.rand(8) + 0.5 for name in ("mean", "var", "weight", "bias")}
    model = model_of(forward, conv=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8), drop=nn.Identity(), **rows)
    assert check(model, torch.randn(4, 8, 6, 6)).report.int8_share == 1


def test_a_norm_by_function_whose_result_is_changed_through_a_view(model_of):
    def forward(self, x):
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.weight, self.bias, False, 0.1, 1e-5)
        y[:, :2].mul_(10)
        return y

    rows = {name: torch.rand(8) + 0.5 for name in ("mean", "var", "weight", "bias")}
    check(model_of(forward, conv=nn.Conv2d(8, 8, 3), **rows), torch.randn(4, 8, 6, 6))


def test_a_norm_of_its_own_statistics_stays_float(model_of):
    model = model_of(lambda s, x: F.batch_norm(s.conv(x), None, None, training=True), conv=nn.Conv2d(8, 8, 3))
    x = torch.randn(4, 8, 6, 6)
    qmodel = fxq.quantize(model, x)
    assert output_sqnr(model(x), qmodel(x)) > 30


def test_attention_with_the_heads_in_the_batch(model_of):
    """BLOOM: a bias for each head within the product, a mask for each sentence behind it, in its own shape."""

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part.reshape(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8) for part in self.qkv(x).chunk(3, -1))
        bias = torch.arange(t) * self.slopes.repeat(b, 1)[..., None].reshape(b * 4, 1, 1)
        scores = bias.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=8**-0.5).view(b, 4, t, -1)
        weights = F.softmax(scores + torch.ones(t, t).triu(1)[None, None] * -1e9, -1).view(b * 4, t, -1)
        weights.view(b, 4, t, t).mean(1)  # for those who ask
        return self.out(torch.bmm(weights, v).view(b, 4, t, 8).transpose(1, 2).reshape(b, t, 32))

    model = model_of(forward, qkv=nn.Linear(32, 96), out=nn.Linear(32, 16), slopes=torch.tensor([0.5, 0.25, 0.1, 0.05]))
    qmodel = check(model, torch.randn(4, 10, 32))
    assert qmodel.report.int8_share == 1
    x = torch.randn(2, 7, 32)
    assert output_sqnr(model(x), qmodel(x)) > 20


def test_a_product_of_activations_says_why_it_stays_float(model_of):
    """Gemma 2: scores through a tanh are no attention that fxq knows."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v

    qmodel = fxq.quantize(model_of(forward, qkv=nn.Linear(16, 48)), torch.randn(3, 6, 16))
    products = [d for d in qmodel.report.decisions if d.op == "matmul"]
    assert [d.reason for d in products] == [Reason.NO_INTEGER_OP] * 2
    assert all("no part of softmax(q @ k^T * scale + mask) @ v" in d.detail for d in products)


def test_a_size_that_is_a_tensor(model_of):
    """Longformer: the number of chunks by torch.div of an integer."""

    def forward(self, x):
        chunks = torch.div(x.size(1), 4, rounding_mode="trunc")
        y = self.l(x).reshape(x.size(0), chunks, 4, 8)
        return self.l(y.reshape(x.size(0), y.size(1) * 4, 8))

    check(model_of(forward, l=nn.Linear(8, 8)), torch.randn(8, 12, 8))


def test_an_identity_of_none(model_of):
    """Perceiver: an optional norm gets None where there are no inputs to attend to."""

    def forward(self, x, inputs=None):
        inputs = self.norm(inputs)
        return self.l(x if inputs is None else inputs)

    check(model_of(forward, norm=nn.Identity(), l=nn.Linear(8, 8)), torch.randn(32, 8))


def test_a_parameter_given_to_a_norm_by_itself(model_of):
    """Perceiver: latents, expanded to the batch, are the first operand of a layer norm."""

    def forward(self, x):
        latents = self.norm(self.latents.expand(x.shape[0], -1, -1))
        return self.l(latents + x.mean(1, keepdim=True))

    members = {"latents": nn.Parameter(torch.randn(4, 8)), "norm": nn.LayerNorm(8), "l": nn.Linear(8, 8)}
    check(model_of(forward, **members), torch.randn(8, 5, 8))


def test_groups_that_are_a_size(model_of):
    """Mamba: a depthwise convolution with as many groups as its input has channels."""
    model = model_of(lambda s, x: F.conv1d(s.first(x), s.w, None, padding=1, groups=x.shape[1]))
    model.first, model.w = nn.Conv1d(8, 8, 1), nn.Parameter(torch.randn(8, 1, 3))
    decisions = check(model, torch.randn(8, 8, 12)).report.decisions
    assert [d.form for d in decisions if d.macs] == ["int8", "float"]
    assert "groups are computed at run time" in next(d.detail for d in decisions if d.reason is Reason.NO_INTEGER_OP)


def test_a_module_without_operands(model_of):
    """A table that a module of its own makes, with code that stays a leaf."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(8))

        def forward(self):
            return self.rows * float(self.rows[0] > 0)

    check(model_of(lambda s, x: s.l(x + s.table()), l=nn.Linear(8, 8), table=Table()), torch.randn(32, 8))


class Cache:
    """Keys of the calls so far."""

    def __init__(self):
        self.keys = []


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.keys.append(self.key(x))
        return torch.cat(cache.keys, 1)


def test_a_cache_that_a_leaf_hands_down_is_not_filled_by_looking_at_it(model_of):
    """XLM: data decide at the root, and what stands inside is called with an object that it changes."""

    def forward(self, x):
        y = self.inner(x, Cache()) if x.sum() > -1e9 else x
        assert y.shape == x.shape
        return y

    model = model_of(forward, inner=Attends())
    x = torch.randn(8, 5, 8)
    with pytest.raises(fxq.TraceError, match=r"test_architectures.py:\d+ .*frontend='leaf'"):
        fxq.quantize(model, x)
    qmodel = fxq.quantize(model, x, frontend="leaf")
    assert {d.module for d in qmodel.report.decisions if d.form == "int8"} == {"inner.key"}
    assert output_sqnr(model(x), qmodel(x)) > 30
