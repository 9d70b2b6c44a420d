"""fuse_norm: a norm becomes fxq's own op, with the quantize behind it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import Reason
from fxq.ops.norm import norm, norm_and_quantize, norm_quantize
from fxq.pipeline import run
from fxq.qdq import quantize
from passes import fuse_norm

X = torch.randn(16, 8)
OPS = (norm, norm_quantize, norm_and_quantize)


def norms(gm):
    return [node for node in gm.graph.nodes if node.target in OPS]


def fuse(staged, model, x=X, recipe=None):
    gm, ctx = staged(model, x, "fuse-norm", recipe)
    before = gm(x)
    run((fuse_norm.PASS,), gm, ctx)
    for a, b in zip(
        before if isinstance(before, tuple) else (before,),
        gm(x) if isinstance(before, tuple) else (gm(x),),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    assert fuse_norm.PASS.run(gm, ctx) == 0
    return gm, ctx


def llama(s, x):
    variance = x.pow(2).mean(-1, keepdim=True)
    return s.w * (x * torch.rsqrt(variance + 1e-6))


SPELLINGS = {
    "nn.LayerNorm": lambda s, x: s.layer(x),
    "F.layer_norm": lambda s, x: F.layer_norm(x, (8,), s.w, eps=1e-6),
    "F.layer_norm, nothing": lambda s, x: F.layer_norm(x, normalized_shape=[x.shape[-1]]),
    "nn.RMSNorm": lambda s, x: s.rms(x),
    "F.rms_norm": lambda s, x: F.rms_norm(x, (8,), s.w, 1e-6),
    "Llama": llama,
    "by hand": lambda s, x: x * (torch.mean(torch.square(x), dim=-1, keepdim=True) + 1e-6).rsqrt() * s.w,
    "no weight": lambda s, x: torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-6) * x,
}


@pytest.fixture
def model(model_of):
    def make(forward):
        torch.manual_seed(3)
        members = {
            "layer": nn.LayerNorm(8),
            "rms": nn.RMSNorm(8),
            "a": nn.Linear(8, 8),
            "w": nn.Parameter(torch.rand(8)),
        }
        for module in (members["layer"], members["rms"]):
            nn.init.normal_(module.weight)
        return model_of(forward, **members)

    return make


@pytest.mark.parametrize("name", SPELLINGS)
def test_between_an_island_and_a_linear(staged, model, name):
    spelled = SPELLINGS[name]
    gm, ctx = fuse(staged, model(lambda s, x: s.a(spelled(s, x))))
    (node,) = norms(gm)
    assert node.target is norm_quantize
    assert node.args[1] == ("layer_norm" if "ayer" in name else "rms_norm")
    if name not in ("F.layer_norm, nothing", "by hand"):  # by hand, the weight is a factor of the quantize behind
        assert (node.args[2] is None) == ("no" in name.split(", ")[-1].split())
    assert not [n for n in gm.graph.nodes if n.target is quantize]
    own = [d for d in ctx.report.decisions if d.reason is Reason.OWN_FLOAT]
    assert own
    assert all(d.form == "float" for d in own)
    torch.testing.assert_close(gm(X), model(lambda s, x: s.a(spelled(s, x)))(X), rtol=0, atol=0.1)


def test_read_in_float_as_well(staged, model, text):
    gm, _ = fuse(staged, model(lambda s, x: (lambda y: s.a(y) + y)(s.layer(x))))
    assert [line.partition("(")[0] for line in text(gm).splitlines()] == [
        "%0 = fxq.norm_and_quantize",
        "%1 = getitem",
        "%2 = getitem",
        "%3 = fxq.qlinear_float",
        "return %3",
    ]


def test_read_in_float_alone(staged, model):
    gm, _ = fuse(staged, model(lambda s, x: s.layer(s.a(x))))
    assert [node.target for node in norms(gm)] == [norm]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.layer_norm(x, (16, 8)),
        lambda s, x: F.layer_norm(x.double(), (8,)),
        lambda s, x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6),
        lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.w),
        lambda s, x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6),
        lambda s, x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda s, x: (lambda v: (x * torch.rsqrt(v + 1e-6), v))(x.pow(2).mean(-1, keepdim=True)),
        lambda s, x: (lambda y: (y[:, 0].mul_(2), y))(F.layer_norm(x, (8,))),
    ],
    ids=["two dimensions", "float64", "columns", "eps a tensor", "cubes", "another x", "variance read", "in place"],
)
def test_left_alone(staged, model, forward):
    gm, ctx = staged(model(forward), X, "fuse-norm")
    assert fuse_norm.PASS.run(gm, ctx) == 0
    assert not norms(gm)


def test_what_the_recipe_keeps_float_stays_torchs(model):
    model = model(lambda s, x: s.a(s.layer(x)))
    for recipe in (fxq.Recipe(modules={"layer": fxq.FLOAT}), fxq.Recipe(ops={"norm": fxq.FLOAT})):
        qmodel = fxq.quantize(model, X, recipe=recipe)
        assert not norms(qmodel)
        (decision,) = [d for d in fxq.report(qmodel).decisions if d.op == "LayerNorm"]
        assert decision.reason is Reason.USER_EXCLUDED


def test_golden_compare_files_and_other_batches(model, tmp_path):
    block = model(lambda s, x: (lambda y: s.layer(s.a(y) + y))(s.rms(x)))
    qmodel = fxq.quantize(block, X)
    assert {node.target for node in norms(qmodel)} == {norm, norm_and_quantize}
    x = torch.randn(3, 5, 8)
    qmodel.requires_grad_(False)
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
    compared = fxq.compare(block, qmodel, X)
    assert {"fxq.norm", "fxq.norm_and_quantize"} <= {layer.op for layer in compared.layers}
    assert min(layer.alone for layer in compared.layers) > 20
    fxq.save(qmodel, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(x), qmodel(x))
    torch.testing.assert_close(torch.compile(qmodel, fullgraph=True, backend="aot_eager")(x), qmodel(x))
