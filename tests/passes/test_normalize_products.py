"""Every spelling of a linear becomes one: einsum, parts of a weight, inputs of one to five dimensions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.pipeline import run
from passes import normalize, rewrite_einsum

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
SEQ = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
W = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
WIDE = nn.Parameter(torch.randn(24, 8, generator=torch.Generator().manual_seed(3)))
B = nn.Parameter(torch.randn(24, generator=torch.Generator().manual_seed(4)))


@pytest.fixture
def normalized(staged, text):
    """The text of a model's graph after rewrite_einsum and normalize, whose numbers were checked, twice the same."""

    def normalize_and_print(model, *inputs):
        gm, ctx = staged(model, inputs, "rewrite-einsum")
        steps = (rewrite_einsum.PASS, normalize.PASS)
        run(steps, gm, ctx)
        once = text(gm)
        assert [step.run(gm, ctx) for step in steps] == [0, 0]
        assert text(gm) == once
        return once

    return normalize_and_print


EINSUMS = {
    "rows": (lambda s, x: torch.einsum("bi,oi->bo", x, s.w), X, "w"),
    "dots": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), SEQ, "w"),
    "letters": (lambda s, x: torch.einsum("b t c, d c -> b t d", x, s.w), SEQ, "w"),
    "list": (lambda s, x: torch.einsum("btc,dc->btd", [x, s.w]), SEQ, "w"),
    "weight first": (lambda s, x: torch.einsum("dc,btc->btd", s.w, x), SEQ, "w"),
    "not transposed": (lambda s, x: torch.einsum("bti,io->bto", x, s.w.t()), SEQ, "w"),
    "one row": (lambda s, x: torch.einsum("i,oi->o", x, s.w), X[0], "w"),
    "plain": (lambda s, x: torch.einsum("bi,io->bo", x, s.wide), torch.randn(6, 24), "wide_t"),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsums_that_are_a_linear(name, model_of, normalized):
    forward, x, weight = EINSUMS[name]
    assert normalized(model_of(forward, w=W, wide=WIDE), x) == f"%0 = linear(x, {weight}, None)\nreturn %0"


NOT_LINEARS = {
    "other operand varies": lambda s, x: torch.einsum("bi,oi->bo", x, x),
    "result turned": lambda s, x: torch.einsum("bi,oi->ob", x, s.w),
    "summed letter not last": lambda s, x: torch.einsum("ib,oi->bo", x.t(), s.w),
    "outer product": lambda s, x: torch.einsum("bi,oj->bioj", x, s.w),
    "diagonal": lambda s, x: torch.einsum("bi,ii->bi", x, s.square),
    "sum kept": lambda s, x: torch.einsum("bi,oi->bio", x, s.w),
    "implicit result": lambda s, x: torch.einsum("bi,oi", x, s.w),
    "one operand": lambda s, x: torch.einsum("bi->ib", x),
    "three operands": lambda s, x: torch.einsum("bi,oi,o->bo", x, s.w, s.b),
}


@pytest.mark.parametrize("name", NOT_LINEARS)
def test_other_einsums_stay(name, model_of, normalized):
    model = model_of(NOT_LINEARS[name], w=W, square=torch.eye(8), b=B[:4].detach().clone())
    assert "einsum(" in normalized(model, X)


PARTS = {
    "slice": (lambda s, x: F.linear(x, s.wide[8:16], s.b[8:16]), "linear(x, wide_part, b_part)"),
    "index": (lambda s, x: x @ s.cube[1].t(), "linear(x, cube_part, None)"),
    "narrow": (lambda s, x: F.linear(x, s.wide.narrow(0, 8, 8)), "linear(x, wide_part, None)"),
    "chunk": (lambda s, x: F.linear(x, s.wide.chunk(3)[1]), "linear(x, wide_part, None)"),
    "split by size": (lambda s, x: F.linear(x, torch.split(s.wide, [8, 16])[0]), "linear(x, wide_part, None)"),
    "of a part": (lambda s, x: F.linear(x, s.wide[8:][:8]), "linear(x, wide_part_part, None)"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_weight_are_constants(name, model_of, normalized):
    forward, expected = PARTS[name]
    model = model_of(forward, wide=WIDE, b=B, cube=WIDE.detach().reshape(3, 8, 8).clone())
    assert f"= {expected}\n" in normalized(model, X)


def test_a_part_of_a_buffer_that_changes_is_no_constant(model_of, normalized):
    def forward(self, x):
        self.state.add_(1)
        return F.linear(x, self.state[:4])

    assert "_part" not in normalized(model_of(forward, state=torch.zeros(8, 8)), X)


def test_the_table_of_positions_stays_dynamic(model_of):
    model = model_of(lambda s, x: s.l(x + s.table[: x.shape[1]]), l=nn.Linear(8, 4), table=torch.randn(16, 8))
    qmodel = fxq.quantize(model, SEQ)
    assert qmodel(torch.randn(2, 9, 8)).shape == (2, 9, 4)


@pytest.mark.parametrize("rank", range(1, 6))
def test_inputs_of_any_rank(rank):
    x = torch.randn(*(2,) * (rank - 1), 8)
    qmodel = fxq.quantize(nn.Linear(8, 4).eval(), x, check=True)
    assert fxq.report(qmodel).int8_share == 1
    assert qmodel(x).shape == (*x.shape[:-1], 4)


@pytest.mark.filterwarnings("ignore::fxq.api.KeptFloatWarning")
def test_bilinear_is_reported(model_of):
    qmodel = fxq.quantize(model_of(lambda s, x: s.m(x, x), m=nn.Bilinear(8, 8, 4)), X)
    (decision,) = fxq.report(qmodel).refusals()
    assert (decision.op, decision.module, decision.macs > 0) == ("Bilinear", "m", True)
