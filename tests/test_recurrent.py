"""Attention and recurrent modules of torch.nn: projections are integers, recurrences are listed with their reason."""

import copy

import pytest
import torch
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.decisions import Reason
from fxq.tracing import TracingWarning

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
Y = X.flip(0) * 0.5

pytestmark = pytest.mark.filterwarnings("ignore::fxq.api.KeptFloatWarning")


def linears(qmodel):
    return [d for d in fxq.report(qmodel).decisions if d.op == "linear"]


ATTENTION = {
    "self": (lambda s, x: s.m(x, x, x, need_weights=False)[0], (X,)),
    "self with weights": (lambda s, x: s.m(x, x, x), (X,)),
    "cross": (lambda s, x, y: s.m(x, y, y)[0], (X, Y)),
    "three": (lambda s, x, y: s.m(x, y, x)[0], (X, Y)),
    "masked": (
        lambda s, x, p: s.m(x, x, x, key_padding_mask=p, need_weights=False)[0],
        (X, torch.arange(6).expand(4, 6) > 3),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_projections_of_attention_are_integers(name, model_of):
    forward, inputs = ATTENTION[name]
    model = model_of(forward, m=nn.MultiheadAttention(16, 4, batch_first=True).eval())
    qmodel = fxq.quantize(model, inputs, check=True)
    assert len(linears(qmodel)) >= 2
    assert {d.form for d in linears(qmodel)} == {"int8"}
    assert fxq.report(qmodel).sqnr > 25
    assert not any(t.is_floating_point() and t.dim() > 1 for t in qmodel.state_dict().values())
    fewer = tuple(tensor[:2] for tensor in inputs)
    assert fxq.compare(model, qmodel, fewer).output > 20
    assert torch.equal(
        torch.utils._pytree.tree_leaves(copy.deepcopy(qmodel)(*fewer))[0],
        torch.utils._pytree.tree_leaves(qmodel(*fewer))[0],
    )


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (X,)),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu"), (X,)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), (X,)),
        (nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), (X, Y)),
        (nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (X, Y)),
    ],
    ids=["encoder layer", "norm first", "encoder", "decoder layer", "transformer"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_all_linears_of_transformers_are_integers(module, inputs):
    qmodel = fxq.quantize(module.eval(), inputs)
    assert {d.form for d in linears(qmodel)} == {"int8"}
    assert {d.op for d in fxq.report(qmodel).kept_float() if d.macs} <= {"scaled_dot_product_attention", "bmm"}
    assert fxq.report(qmodel).sqnr > 20
    assert qmodel(*(tensor[:2] for tensor in inputs)).shape[0] == 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_listed_with_their_reason(kind, model_of):
    model = model_of(lambda s, x: s.l(s.r(x)[0]), r=kind(16, 8, batch_first=True), l=nn.Linear(8, 4))
    qmodel = fxq.quantize(model, X)
    (decision,) = [d for d in fxq.report(qmodel).decisions if d.module == "r" and d.macs]
    assert (decision.form, decision.reason) == ("float", Reason.RECURRENT)
    assert decision.macs >= 4 * 6 * 8 * (16 + 8)
    assert decision in fxq.report(qmodel).refusals()
    assert {d.form for d in linears(qmodel)} == {"int8"}
    assert fxq.compare(model, qmodel, X[:2]).output > 20


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_are_listed_with_their_reason(kind, model_of):
    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.r(step, state)
        return self.l(state[0] if isinstance(state, tuple) else state)

    model = model_of(forward, r=kind(16, 8), l=nn.Linear(8, 4))
    qmodel = fxq.quantize(model, X)
    cells = [d for d in fxq.report(qmodel).decisions if d.module == "r" and d.macs]
    assert {(d.form, d.reason) for d in cells} == {("float", Reason.RECURRENT)}
    assert len(cells) == 6
    assert fxq.compare(model, qmodel, X[:2]).output > 20


def test_gates_written_with_linears_as_the_report_advises(model_of):
    cell, reads, keeps = nn.GRUCell(16, 8), nn.Linear(16, 24), nn.Linear(8, 24)
    reads.weight, reads.bias, keeps.weight, keeps.bias = cell.weight_ih, cell.bias_ih, cell.weight_hh, cell.bias_hh

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            (r, z, n), (own_r, own_z, own_n) = self.reads(step).chunk(3, 1), self.keeps(state).chunk(3, 1)
            update = torch.sigmoid(z + own_z)
            state = (1 - update) * torch.tanh(n + torch.sigmoid(r + own_r) * own_n) + update * state
        return state

    model, state = model_of(forward, reads=reads, keeps=keeps), None
    for step in X.unbind(1):
        state = cell(step, state)
    torch.testing.assert_close(model(X), state)
    qmodel = fxq.quantize(model, X)
    assert [d.form for d in linears(qmodel)] == ["int8"] * 12
    assert fxq.compare(model, qmodel, X[:2]).output > 20


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_whose_fused_path_zeroes_padding_says_so(model_of):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)
    model = model_of(lambda s, x, p: s.e(x, src_key_padding_mask=p), e=encoder)
    padded = torch.arange(6).expand(4, 6) > torch.tensor([5, 3, 5, 4])[:, None]
    with pytest.warns(TracingWarning, match=r"other values behind a padding mask .* enable_nested_tensor=False"):
        qmodel = fxq.quantize(model, (X, padded))
    kept = ~padded
    with torch.no_grad():
        assert output_sqnr(model(X, padded)[kept], qmodel(X, padded)[kept]) > 25
