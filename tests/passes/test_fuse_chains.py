"""fuse_chains: runs of linears become one call with the same bits, and can be taken apart again."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.ops.chain import qchain, qchain_float
from fxq.ops.linear import qlinear, qlinear_float
from fxq.pipeline import run
from fxq.qdq import quantize
from passes import fuse_chains

CHAINS = (qchain, qchain_float)


@pytest.fixture
def fused(staged):
    def fuse(model, inputs, step=fuse_chains.PASS):
        gm, ctx = staged(model, inputs, "fuse-chains")
        before = copy.deepcopy(gm)
        run((step,), gm, ctx)
        count = ctx.timings[-1][1]
        assert step.run(gm, ctx) == 0, "idempotent"
        return before, gm, count

    return fuse


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_an_mlp_becomes_one_call(fused, text):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU6(), nn.Linear(4, 2))
    before, after, count = fused(model, torch.randn(16, 8))
    assert targets(before) == [quantize, qlinear, qlinear, qlinear_float]
    assert targets(after) == [qchain_float]
    assert count == 1
    assert text(after) == "%0 = fxq.qchain_float(input, chain)\nreturn %0"


def test_same_bits_on_the_zoo(zoo, fused):
    before, after, _ = fused(zoo.model, zoo.inputs)
    for rows in (zoo.inputs, tuple(torch.cat([t, t.flip(0)]) for t in zoo.inputs)):
        expected, found = (torch.utils._pytree.tree_leaves(gm(*(t.clone() for t in rows))) for gm in (before, after))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, torch.Tensor))


def test_a_value_that_others_read_ends_a_run(fused, model_of):
    model = model_of(lambda s, x: s.b(F.relu(s.a(x))) + F.relu(s.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    _, after, count = fused(model, torch.randn(16, 8))
    assert count == 0, "the weight of `a` is shared by two calls"
    assert not set(CHAINS) & set(targets(after))


def test_a_quantize_with_two_readers_stays_outside(fused, model_of):
    model = model_of(
        lambda s, x: (s.b(F.relu(s.a(x))), s.c(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)
    )
    _, after, count = fused(model, torch.randn(16, 8))
    assert count == 1
    assert targets(after)[0] is quantize
    assert qchain_float in targets(after)
    assert qlinear_float in targets(after)


def test_one_operation_is_no_run(fused, model_of):
    model = model_of(lambda s, x: (s.a(x), s.b(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    _, after, count = fused(model, torch.randn(16, 8))
    assert count == 0
    assert not set(CHAINS) & set(targets(after))


def test_in_the_end_a_linear_by_itself_is_a_chain_too(fused, model_of):
    model = model_of(lambda s, x: (s.a(x), s.b(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    x = torch.randn(16, 8)
    before, after, count = fused(model, x, fuse_chains.SINGLE)
    assert count == 2
    assert targets(before) == [quantize, qlinear_float, qlinear_float]
    assert targets(after) == [quantize, qchain_float, qchain_float]
    assert all(torch.equal(a, b) for a, b in zip(before(x), after(x), strict=True))
    assert set(after.state_dict()) == {"a.chain", "b.chain"}, "no second copy of the weights"


def test_in_the_end_a_quantize_by_itself_stays_and_so_does_a_linear_that_adds_or_shares(fused, model_of):
    model = model_of(lambda s, x: s.a(x) + s.a(x * 2) + x, a=nn.Linear(8, 8))
    _, after, count = fused(model, torch.randn(16, 8), fuse_chains.SINGLE)
    assert count == 0
    assert not set(CHAINS) & set(targets(after))
    assert quantize in targets(after)


def test_code_shows_the_layers_and_expand_takes_them_apart():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(16, 8)
    qmodel = fxq.quantize(model, x)
    assert "# _0_qlinear: qlinear 8 -> 16" in qmodel.code
    expanded = fxq.expand(qmodel)
    assert targets(expanded) == [quantize, qlinear, qlinear_float]
    assert torch.equal(expanded(x), qmodel(x))
    names = set(expanded.state_dict())
    assert {"0.weight_packed", "0.bias_i32", "0.multiplier", "2.weight_packed"} <= names
    assert {d.op for d in fxq.compare(model, qmodel, x).layers} == {"fxq.quantize", "fxq.qlinear", "fxq.qlinear_float"}


def test_the_layers_survive_pickle_and_files(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(16, 8)
    qmodel = fxq.quantize(model, x)
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    fxq.save(qmodel, tmp_path / "m.fxq")
    for other in (torch.load(buffer, weights_only=False), fxq.load(tmp_path / "m.fxq"), copy.deepcopy(qmodel)):
        assert other.code == qmodel.code
        assert torch.equal(fxq.expand(other)(x), qmodel(x))
