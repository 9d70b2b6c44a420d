"""judge_lookup: a function that eight bits of its operand would ruin stays float, and only that one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.observers import Observer
from fxq.ops.lookup import lookup, lookup_channels
from fxq.pipeline import run
from fxq.spelling import LINEAR
from passes import judge_lookup

X = torch.randn(64, 8)


def steep(x):
    return 1 / (x.square() + 1e-4)


@pytest.fixture
def judged(staged, model_of):
    def judge(forward, **members):
        model = model_of(forward, l=nn.Linear(8, 8), k=nn.Linear(8, 8), m=nn.Linear(8, 8), **members)
        gm, ctx = staged(model, X, "judge-lookup")
        before, graph = gm(X), str(gm.graph)
        run((judge_lookup.PASS,), gm, ctx)
        assert torch.equal(gm(X), before)
        assert judge_lookup.PASS.run(gm, ctx) == 0
        assert (ctx.timings[-1][1] == 0) == (str(gm.graph) == graph)
        return gm, ctx

    return judge


def observed(gm):
    return [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), Observer)]


def decisions(ctx):
    return [(d.op, d.form) for d in ctx.report.decisions if d.op != "linear"]


def test_what_a_table_ruins_stays_float(judged):
    gm, ctx = judged(lambda s, x: s.k(steep(s.l(x))))
    assert ctx.timings[-1][1] == 1
    assert not [n for n in observed(gm) if n.args[0].target is LINEAR], "the linear gives float32"
    assert decisions(ctx) == [("square", "float"), ("add", "float"), ("truediv", "float")]
    assert {d.reason for d in ctx.report.decisions if d.form == "float"} == {fxq.Reason.UNPROFITABLE}
    assert all("dB by itself" in d.detail for d in ctx.report.decisions if d.form == "float")


def test_through_moves(judged):
    gm, _ = judged(lambda s, x: s.k(steep(s.l(x).reshape(-1, 4)).reshape(-1, 8)))
    assert not [n for n in observed(gm) if n.args[0].target is LINEAR]


@pytest.mark.parametrize(
    "function", [F.silu, F.leaky_relu, F.softplus, torch.tanh, lambda x: 3 * x - 2, lambda x: x.abs().sqrt()]
)
def test_what_a_table_can_do_is_left_alone(judged, function):
    _, ctx = judged(lambda s, x: s.k(function(s.l(x) + x)))
    assert ctx.timings[-1][1] == 0
    assert {form for _, form in decisions(ctx)} == {"int8"}


def test_a_result_that_eight_bits_ruin_anyway_is_no_reason(judged):
    _, ctx = judged(lambda s, x: s.k(torch.where(s.l(x) > 100, 1e6, s.l(x))))
    assert ctx.timings[-1][1] == 0


def test_others_keep_the_integers(judged):
    gm, ctx = judged(lambda s, x: (lambda y: s.k(steep(y)) + s.m(y))(s.l(x)))
    assert ("square", "float") in decisions(ctx)
    (observer,) = [n for n in observed(gm) if n.args[0].target is LINEAR]
    assert [user.target for user in observer.users] == [LINEAR]


def test_what_moved_integers_tie_is_left_alone(judged):
    _, ctx = judged(lambda s, x: (lambda y: s.k(steep(y)) + s.m(y))(s.l(x).reshape(-1, 8).flip(0)))
    assert ctx.timings[-1][1] == 0
    assert ("square", "int8") in decisions(ctx)


def test_by_channel(judged):
    prelu = nn.PReLU(8)
    _, ctx = judged(lambda s, x: s.k(steep(s.p(s.l(x)))) + s.m(s.p(s.l(x) + x)), p=prelu)
    assert decisions(ctx)[:1] == [("PReLU", "float")]
    assert [form for op, form in decisions(ctx) if op == "PReLU"] == ["float", "int8"]


def test_whole_model(model_of):
    model = model_of(lambda s, x: s.k(steep(s.l(x))), l=nn.Linear(8, 8), k=nn.Linear(8, 8))
    qmodel = fxq.quantize(model, X, check=True, on_low_sqnr="ignore")
    assert not [node for node in qmodel.graph.nodes if node.target in (lookup, lookup_channels)]


def test_no_rows(staged, model_of):
    model = model_of(lambda s, x: s.k(steep(s.l(x))), l=nn.Linear(8, 8), k=nn.Linear(8, 8))
    gm, ctx = staged(model, X, "judge-lookup")
    ctx.examples = type(ctx.examples)((X[:0],))
    assert judge_lookup.PASS.run(gm, ctx) == 0


def test_progress_is_shown(staged, model_of, capsys):
    model = model_of(lambda s, x: s.k(steep(s.l(x))), l=nn.Linear(8, 8), k=nn.Linear(8, 8))
    gm, ctx = staged(model, X, "judge-lookup")
    ctx.progress = True
    run((judge_lookup.PASS,), gm, ctx)
    assert "judging tables of functions" in capsys.readouterr().err
