"""judge_attention: an attention that integers would ruin stays float, and only that one."""

import pytest
import torch
from torch import nn

import fxq
from fxq.observers import Observer
from fxq.ops.attention import qattention, qattention_float
from fxq.pipeline import run
from fxq.spelling import LINEAR
from passes import judge_attention

X = torch.randn(4, 10, 16)


class Attention(nn.Module):
    """Self-attention with a channel of q at `outlier`, which no channel of k answers."""

    def __init__(self, outlier):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        with torch.no_grad():
            self.qkv.bias[0] = outlier
            self.qkv.weight[16] = self.qkv.bias[16] = 0

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = torch.softmax(q @ k.mT * 3.0, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def calls(gm, *targets):
    return [node for node in gm.graph.nodes if node.target in targets]


def observed(gm):
    return [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), Observer)]


def test_what_integers_ruin_stays_float(staged):
    gm, ctx = staged(Attention(1000.0), X, "judge-attention")
    before, count = gm(X), len(observed(gm))
    run((judge_attention.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert torch.equal(gm(X), before)
    assert len(observed(gm)) < count
    assert not [n for n in observed(gm) if n.args[0].target is LINEAR and n.users], "the linears give float32"
    (decision,) = [d for d in ctx.report.decisions if d.op == "attention"]
    assert (decision.form, decision.reason) == ("float", fxq.Reason.UNPROFITABLE)
    assert "dB" in decision.detail
    assert judge_attention.PASS.run(gm, ctx) == 0


def test_what_integers_can_do_is_left_alone(staged):
    gm, ctx = staged(Attention(0.0), X, "judge-attention")
    before = str(gm.graph)
    run((judge_attention.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 0 and str(gm.graph) == before
    (decision,) = [d for d in ctx.report.decisions if d.op == "attention"]
    assert decision.form == "int8" and "dB" in decision.detail
    assert judge_attention.PASS.run(gm, ctx) == 0


@pytest.mark.parametrize("outlier", [0.0, 1000.0])
def test_whole_model(outlier):
    model = Attention(outlier).eval()
    qmodel = fxq.quantize(model, X, check=True)
    assert bool(calls(qmodel, qattention, qattention_float)) is (outlier == 0)
    assert fxq.report(qmodel).sqnr > 20
    assert "dB" in str(fxq.report(qmodel))


def test_one_of_two(model_of):
    model = model_of(lambda s, x: s.b(s.a(x)), a=Attention(1000.0), b=Attention(0.0))
    qmodel = fxq.quantize(model, X, on_low_sqnr="ignore")
    assert [d.form for d in qmodel.report.decisions if d.op == "attention"] == ["float", "int8"]
    assert len(calls(qmodel, qattention)) == 1


def test_integers_that_others_read_too_keep_their_observers(staged, model_of):
    def forward(self, x):
        q = self.q(x)
        return torch.softmax(q @ q.mT * 500.0, -1) @ q + self.k(torch.relu(q))

    gm, ctx = staged(model_of(forward, q=nn.Linear(16, 16), k=nn.Linear(16, 16)), X, "judge-attention")
    before = str(gm.graph)
    run((judge_attention.PASS,), gm, ctx)
    (decision,) = [d for d in ctx.report.decisions if d.op == "attention"]
    released = ctx.timings[-1][1] == 1
    assert (decision.form == "float") is released
    assert released or str(gm.graph) == before


def test_progress_and_time_are_shown(capsys, monkeypatch):
    monkeypatch.setattr("fxq.pipeline.TOLD", 0.0)
    report = fxq.report(fxq.quantize(Attention(0.0).eval(), X, progress=True))
    assert "judging attention" in capsys.readouterr().err
    assert "judge-attention: 0 changes in" in str(report)
