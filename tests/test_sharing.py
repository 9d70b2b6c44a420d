"""What fxq returns shares no memory with the user's model, and a model that writes to its own memory stays as it is."""

import copy

import pytest
import torch
from torch import nn

import fxq
from fxq.graph import memory_of
from fxq.tracing.sharing import own, shared, tensors_of

X = torch.randn(16, 8)


class Model(nn.Module):
    """Linears that stay float beside ones that do not; a norm; a tied weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.third.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(8))

    def write(self, x):
        """Nothing."""

    def forward(self, x):
        self.write(x)
        return self.third(self.second(self.norm(self.first(x)))) + self.seen


class InPlace(Model):
    def write(self, x):
        self.seen.add_(1)


class BehindTheVersion(Model):
    def write(self, x):
        self.seen.data.copy_(x[0])


class OtherBatches(Model):
    def write(self, x):
        if x.shape[0] != 16:
            self.seen.fill_(3)


class Weights(Model):
    def write(self, x):
        self.norm.weight.mul_(1.5)


class WhereCompiled(Model):
    """What its eager runs do cannot be traced, and what it does where it is being compiled writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def write(self, x):
        if torch.compiler.is_compiling():
            self.count.add_(1)
        elif (x == x).all():
            return


KINDS = (Model, InPlace, BehindTheVersion, OtherBatches, Weights, WhereCompiled)
RECIPE = fxq.Recipe(modules={"second": fxq.FLOAT}, judge_costs=False)


def memories(module):
    return {memory_of(tensor) for tensor in tensors_of(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_shared_and_the_model_stays_as_it_is(kind):
    model = kind().eval()
    before, addresses = copy.deepcopy(model.state_dict()), [t.data_ptr() for t in tensors_of(model)]
    traced, prepared = fxq.trace(model, X), fxq.prepare(model, X, recipe=RECIPE)
    fxq.calibrate(prepared, [X])
    kept = copy.deepcopy(prepared.state_dict())
    made = [traced, prepared, fxq.convert(prepared), fxq.quantize(model, X, recipe=RECIPE, on_low_sqnr="ignore")]
    made += [fxq.prepare_qat(model, X)]
    for i, module in enumerate(made):
        for other in (model, *made[:i]):
            assert memories(module).isdisjoint(memories(other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert addresses == [t.data_ptr() for t in tensors_of(model)]
    for name, tensor in kept.items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, prepared.state_dict()[name])


def test_a_quantized_model_does_not_follow_its_origin():
    model = Model().eval()
    qmodel = fxq.quantize(model, X, recipe=RECIPE)
    y = qmodel(X)
    with torch.no_grad():
        for tensor in tensors_of(model):
            tensor.zero_()
    assert torch.equal(qmodel(X), y)


def test_what_is_written_where_the_model_is_compiled_begins_as_in_the_model():
    traced = fxq.trace(WhereCompiled().eval(), X)
    assert float(traced.count) == 0
    traced(X)
    assert float(traced.count) == 1


def test_own_keeps_what_is_tied_and_what_is_a_view():
    model = Model()
    model.part = nn.Parameter(model.first.weight.data[2:4])
    twin = shared(model)
    assert memories(twin) == memories(model)
    own(twin, tensors_of(model))
    assert memories(twin).isdisjoint(memories(model))
    assert twin.third.weight is twin.first.weight
    twin.first.weight.data[2] = 5.0
    assert torch.equal(twin.part, twin.first.weight[2:4])
    assert not torch.equal(twin.part, model.part)
