"""judge_tables: a table that makes most of the output's noise stays float, and no other."""

import pytest
import torch
from torch import nn

import fxq
from fxq.observers import WeightObserver
from fxq.pipeline import run
from passes import judge_tables


class Residual(nn.Module):
    """Tables of different sizes, and a branch beside them."""

    def __init__(self, branch, second=1e-4, tied=False):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(6, 32)
        self.places.weight.data *= second
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.down.weight.data *= branch
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False) if tied else None
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids, places):
        x = self.words(ids) + self.places(places)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return x if self.head is None else (x, self.head(x))


def calls(count=4):
    return [(torch.randint(0, 50, (8, 6)), torch.arange(6).expand(8, 6).contiguous()) for _ in range(count)]


@pytest.fixture
def judged(staged):
    def judge(model):
        example = calls(1)[0]
        gm, ctx = staged(model, example, "judge-tables")
        before, graph = gm(*example), str(gm.graph)
        run((judge_tables.PASS,), gm, ctx)
        assert torch.equal(gm(*example), before)
        assert (ctx.timings[-1][1] == 0) == (str(gm.graph) == graph)
        assert judge_tables.PASS.run(gm, ctx) == 0
        return ctx

    return judge


def forms(ctx):
    return {d.module: d.form for d in ctx.report.decisions if d.op == "embedding"}


def test_a_table_that_makes_the_noise_stays_float(judged):
    ctx = judged(Residual(0.01))
    assert forms(ctx) == {"words": "float", "places": "int8"}
    (kept,) = [d for d in ctx.report.decisions if d.module == "words"]
    assert kept.reason is fxq.Reason.UNPROFITABLE
    assert "with int8 tables (judge_tables=False) the output loses" in kept.detail


def test_all_tables_that_make_it(judged):
    assert set(forms(judged(Residual(0.01, second=1.0))).values()) == {"float"}


def test_beside_more_noise_tables_are_int8(judged):
    assert set(forms(judged(Residual(30.0))).values()) == {"int8"}


def test_switched_off():
    model, data = Residual(0.01).eval(), calls()
    qmodel = fxq.quantize(model, data[0], calibration_data=data, recipe=fxq.Recipe(judge_tables=False))
    assert set(forms(qmodel).values()) == {"int8"}


def test_tables_alone_are_int8(staged, model_of):
    model = model_of(lambda s, ids: s.words(ids), words=nn.Embedding(50, 32))
    gm, ctx = staged(model, torch.arange(50), "judge-tables")
    assert judge_tables.PASS.run(gm, ctx) == 0
    assert any(isinstance(m, WeightObserver) for m in gm.modules())


def test_the_whole_way(tmp_path):
    model, data = Residual(0.01).eval(), calls()
    qmodel = fxq.quantize(model, data[0], calibration_data=data)
    assert qmodel.report.sqnr > 50
    assert forms(qmodel)["words"] == "float"
    fxq.save(qmodel, tmp_path / "model.fxq")
    ids, places = calls(1)[0]
    assert torch.equal(fxq.load(tmp_path / "model.fxq")(ids[:3], places[:3]), qmodel(ids[:3], places[:3]))


def test_a_tied_head_stays_int8():
    model, data = Residual(0.01, tied=True).eval(), calls()
    found = {d.module: d.form for d in fxq.quantize(model, data[0], calibration_data=data).report.decisions if d.macs}
    assert found["head"] == "int8"
