"""Models that tempt a tracer to be wrong in silence: each is right, guarded, or refused by one clear error."""

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.decisions import Reason

X = torch.randn(16, 8)
ROWS = torch.randn(256, 8)
OUTSIDE = torch.randn(8)


class Pair(NamedTuple):
    first: torch.Tensor
    rest: tuple


class Outer(NamedTuple):
    pair: Pair
    named: dict


def inplace_slice_of_a_view(s, x):
    y = s.l(x)
    v = y[:, :4]
    v += 1
    v.mul_(2)
    return s.m(y)


def overlapping_assignment(s, x):
    y = s.l(x).clone()
    y[:, 1:3] = y[:, 3:5]
    y[:, 0] = 5
    return s.m(y)


def average(s, x):
    s.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return s.l(x - s.mean)


def rebound_average(s, x):
    s.mean = 0.9 * s.mean + 0.1 * x.mean(0)
    return s.l(x - s.mean)


def weight_through_data(s, x):
    s.l.weight.data.mul_(0.9)
    return s.l(x)


def product_into_out(s, x):
    y = torch.empty(x.shape[0], 8)
    torch.mm(x, s.l.weight.t(), out=y)
    return s.m(y)


def alias_by_name(s, x):
    y = s.l(x)
    z = y
    z += 1
    w = s.m(y)
    y *= 2
    return w + y


def masked_assignment(s, x):
    y = s.l(x)
    y[y < 0] = 0
    return s.m(y)


def autocast(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.l(x)
    return s.m(y.float())


RIGHT = {
    "closure": lambda s, x: s.l(x + OUTSIDE),
    "where with numbers": lambda s, x: s.m(torch.where(s.l(x) > 0, 1.0, -1.0) * x),
    "in-place slice of a view": inplace_slice_of_a_view,
    "overlapping assignment": overlapping_assignment,
    "nested named tuples": lambda s, x: Outer(Pair(s.l(x), (s.m(x), None)), {"k": [s.l(x) + 1, 3]}),
    "mixed dtypes": lambda s, x: s.m(s.l(x) * (x > 0).long()) + (x > 0).float(),
    "expand": lambda s, x: s.m(s.l(x).unsqueeze(1).expand(-1, 3, -1)).sum(1),
    "as_strided": lambda s, x: s.m(s.l(x).t().contiguous().as_strided((8, x.shape[0]), (x.shape[0], 1)).t()),
    "average": average,
    "rebound average": rebound_average,
    "weight through data": weight_through_data,
    "product into out": product_into_out,
    "alias by name": alias_by_name,
    "masked assignment": masked_assignment,
    "functional_call": lambda s, x: torch.func.functional_call(s.l, {"weight": s.m.weight * 2, "bias": s.m.bias}, (x,)),
    "vmap": lambda s, x: torch.vmap(s.l)(x),
    "checkpoint": lambda s, x: torch.utils.checkpoint.checkpoint(s.l, x, use_reentrant=False),
    "autocast": autocast,
    "double in between": lambda s, x: s.m((s.l(x).double() * 2).float()),
    "complex": lambda s, x: s.m(torch.fft.ifft(torch.fft.fft(s.l(x))).real),
    "sparse weight": lambda s, x: s.m(torch.sparse.mm(s.l.weight.to_sparse(), x.t()).t()),
    "bit cast": lambda s, x: s.m(s.l(x).view(torch.int32).view(torch.float32)),
    "inner": lambda s, x: torch.inner(x, s.l.weight),
}


@pytest.mark.filterwarnings("ignore::fxq.KeptFloatWarning", "ignore:.*NumPy array is not writable")
@pytest.mark.parametrize("name", RIGHT)
def test_right_on_other_batches_and_at_every_call(name, model_of):
    linears = {"l": nn.Linear(8, 8).requires_grad_(False), "m": nn.Linear(8, 8)}
    model = model_of(RIGHT[name], mean=torch.zeros(8), **linears)
    qmodel = fxq.quantize(copy.deepcopy(model), X, calibration_data=ROWS.split(16), on_low_sqnr="ignore")
    for rows in (16, 5, 16):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert output_sqnr(model(x.clone()), qmodel(x.clone())) > 20


@pytest.mark.parametrize("forward", [RIGHT["inner"], lambda s, x: torch.mv(s.l.weight, x[0])])
def test_products_of_vectors_are_linears(forward, model_of):
    qmodel = fxq.quantize(model_of(forward, l=nn.Linear(8, 8)), X)
    assert {d.form for d in qmodel.report.decisions if d.op == "linear"} == {"int8"}


def test_a_weight_that_the_model_changes_stays_float(model_of):
    with pytest.warns(fxq.KeptFloatWarning):
        qmodel = fxq.quantize(model_of(weight_through_data, l=nn.Linear(8, 8)), X)
    assert [d.reason for d in qmodel.report.decisions if d.op == "linear"] == [Reason.DYNAMIC_WEIGHT]


class Own(torch.Tensor):
    pass


REFUSED = {
    "subclass": (lambda s, x: s.l(x).as_subclass(Own) * 2, "makes a tensor of the class Own"),
    "nested": (lambda s, x: torch.nested.nested_tensor(list(s.l(x))).to_padded_tensor(0.0), "makes a nested tensor"),
    "gradient": (lambda s, x: torch.func.grad(lambda y: s.l(y).sum())(x), r"calls torch.func \(vmap, grad\)"),
    "generator": (lambda s, x: (y for y in (s.l(x),)), "returns a generator"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused_by_one_clear_error(name, model_of):
    forward, message = REFUSED[name]
    with pytest.raises(fxq.TraceError, match=message):
        fxq.quantize(model_of(forward, l=nn.Linear(8, 8)), X)


def counting(self, x):
    self.calls += 1
    return self.l(x) * self.calls


def counting_in_a_buffer(self, x):
    self.calls.add_(1)
    return self.l(x) * self.calls


def counting_for_nothing(self, x):
    self.calls += 1
    return self.l(x)


class TestStateInPython:
    def test_it_is_an_error_with_a_remedy_that_works(self, model_of):
        model = model_of(counting, l=nn.Linear(8, 8))
        model.calls = 0
        with pytest.raises(fxq.TraceError, match=r"called again, since it changes `calls`; keep that in a buffer"):
            fxq.quantize(model, X)
        model = model_of(counting_in_a_buffer, l=nn.Linear(8, 8), calls=torch.zeros(()))
        qmodel = fxq.quantize(model, X)
        for _ in range(3):
            assert output_sqnr(model(X), qmodel(X)) > 20

    def test_inside_it_is_an_error_too(self, model_of):
        inner = model_of(counting, l=nn.Linear(8, 8))
        inner.calls = 0
        with pytest.raises(fxq.TraceError, match=r"since it changes `1.calls`"):
            fxq.quantize(nn.Sequential(nn.Linear(8, 8), inner).eval(), X)

    def test_what_decides_nothing_is_no_matter(self, model_of):
        model = model_of(counting_for_nothing, l=nn.Linear(8, 8))
        model.calls = 0
        assert fxq.quantize(model, X).report.int8_share == 1


class TestWhatPeopleWrite:
    """Found by attack: each was wrong in silence, or raised what only the one who knows fxq understands."""

    def test_numbers_read_by_torch_export_are_not_constants(self, model_of):
        model = model_of(lambda s, x, i: torch.cat([s.l(x[j : j + 1]) for j in i.tolist()]), l=nn.Linear(8, 8))
        x = torch.randn(32, 8)
        data = [(x, torch.arange(k, k + 2)) for k in range(8)]
        qmodel = fxq.quantize(model, data[1], calibration_data=data)
        assert qmodel.report.frontend.startswith("torch.export")
        rows = torch.tensor([3, 1])
        assert output_sqnr(model(x, rows), qmodel(x, rows)) > 25

    def test_aten_called_by_name(self, model_of):
        def forward(self, x):
            y = torch.ops.aten.linear.default(x, self.l.weight, self.l.bias)
            return torch.ops.aten.view.default(y, [torch.ops.aten.sym_size.int(x, 0), -1]) * torch.ops.aten.item(
                y.max()
            )

        model = model_of(forward, l=nn.Linear(8, 8))
        qmodel = fxq.quantize(model, x := torch.randn(32, 8))
        assert qmodel.report.int8_share == 1
        assert output_sqnr(model(x[:5]), qmodel(x[:5])) > 25

    @pytest.mark.filterwarnings("ignore:the model is in training mode", "ignore::FutureWarning")  # has no eval()
    def test_a_graph_of_torch_export_as_the_model(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        x = torch.randn(32, 8)
        qmodel = fxq.quantize(torch.export.export(model, (x,)).module(), x)
        assert [d.form for d in qmodel.report.decisions if d.op == "linear"] == ["int8", "int8"]
        assert output_sqnr(model(x), qmodel(x)) > 25

    @pytest.mark.parametrize("name", ["iterator", "list"])
    def test_state_that_no_attribute_shows(self, name, model_of):
        forward = {
            "iterator": lambda s, x: s.l(x) * next(s.state),
            "list": lambda s, x: (s.state.append(1), s.l(x) * len(s.state))[1],
        }[name]
        model = model_of(forward, l=nn.Linear(8, 8))
        model.state = {"iterator": itertools.count(1), "list": []}[name]
        with pytest.raises(fxq.TraceError, match="computes something else when it is called again; keep that in a buf"):
            fxq.quantize(model, torch.randn(32, 8))

    def test_lazy_modules(self):
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4)).eval()
        x = torch.randn(32, 8)
        with pytest.raises(fxq.InputError, match=r"parameter 0.weight has no shape yet .*; call the model once"):
            fxq.quantize(model, x)
        model(x)
        assert fxq.quantize(model, x).report.int8_share == 1

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted_models(self):
        with pytest.raises(fxq.InputError, match=r"ScriptModule, .* quantize the nn.Module behind it"):
            fxq.quantize(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), torch.randn(4, 8))

    def test_packed_sequences(self, model_of):
        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)
            return self.l(out)

        model = model_of(forward, r=nn.LSTM(16, 8, batch_first=True), l=nn.Linear(8, 8))
        x, lengths = torch.randn(4, 6, 16), torch.tensor([6, 3, 2, 5])
        qmodel = fxq.quantize(model, (x, lengths))
        (recurrent,) = [d for d in qmodel.report.decisions if d.op == "LSTM"]
        assert recurrent.macs == lengths.sum() * 4 * 8 * (16 + 8)
        assert output_sqnr(model(x, lengths), qmodel(x, lengths)) > 25

    def test_sparse_buffers(self, model_of):
        model = model_of(lambda s, x: s.l(torch.sparse.mm(s.a, x)), l=nn.Linear(8, 8), a=torch.eye(16).to_sparse())
        x = torch.randn(16, 8)
        assert output_sqnr(model(x), fxq.quantize(model, x)(x)) > 25

    def test_an_unbound_tensor_as_arguments(self, model_of):
        inner = model_of(lambda s, *xs: torch.stack([s.l(x) for x in xs]), l=nn.Linear(8, 8))
        model = model_of(lambda s, x: s.m(*x.unbind(0)), m=inner)
        qmodel = fxq.quantize(model, torch.randn(3, 16, 8))
        assert qmodel.report.int8_share == 1
        assert output_sqnr(model(x := torch.randn(3, 7, 8)), qmodel(x)) > 20

    @pytest.mark.parametrize("is_causal", [None, True, False])
    def test_encoder_with_a_mask(self, is_causal, model_of):
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        model = model_of(lambda s, x: s.e(x, mask=s.mask, is_causal=is_causal), e=encoder, mask=mask)
        qmodel = fxq.quantize(model, x := torch.randn(8, 6, 16))
        assert {d.form for d in qmodel.report.decisions if d.op == "linear"} == {"int8"}
        with torch.no_grad():
            assert output_sqnr(model(x[:3]), qmodel(x[:3])) > 25
