"""Models whose names are Python's, torch's, or one another's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxq

X, Y = torch.randn(4, 6), torch.randn(4, 6)
NAMES = {
    "arguments like the names of nodes": lambda self, input, input_1: self.l(input) - input_1,
    "more of them": lambda self, input, input_1_: self.l(input) - input_1_ * input,
    "a buffer called self": lambda self, x, y: self.l(x) * self.self + self.other * y,
    "a power of a negative number": lambda self, x, y: self.l(x) * (-2) ** y.shape[0],
    "an argument called slice": lambda self, x, slice: self.l(x) - slice,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_computes_what_the_model_does(name, model_of):
    model = model_of(NAMES[name], l=nn.Linear(6, 6), self=torch.rand(6), other=torch.rand(6))
    with torch.no_grad():
        expected = model(X, Y)
    gm = fxq.trace(model, (X, Y))
    qmodel = fxq.quantize(model, (X, Y), recipe=fxq.Recipe("float"), progress=False)
    several = [gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), qmodel, pickle.loads(pickle.dumps(qmodel))]
    several += [pickle.loads(pickle.dumps(several[2])), fxq.expand(qmodel)]
    for each in several:
        with torch.no_grad():
            assert torch.equal(each(X, Y), expected)
    fxq.quantize(model, (X, Y), progress=False)


MISTAKEN = {
    "slice": (lambda self, x, slice: self.l(x)[:, 1:] - slice, Y[:, 1:]),
    "device": (lambda self, x, device: {"y": self.l(x) + torch.ones(6, device=device)}, torch.device("cpu")),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_what_cannot_be_written_names_the_argument(name, model_of):
    forward, y = MISTAKEN[name]
    told = rf"its operations do, but its code, where it calls `{name}`, reads the argument of that name; give the arg"
    with pytest.raises(fxq.TraceError, match=told):
        fxq.quantize(model_of(forward, l=nn.Linear(6, 6)), (X, y), progress=False)


@pytest.mark.parametrize("name", ["torch", "inf", "nan"])
@pytest.mark.parametrize("quantize", [fxq.quantize, fxq.prepare_qat])
def test_what_every_graph_may_call_is_no_name_for_an_argument(name, quantize, model_of):
    forward = eval(f"lambda self, {name}: self.l({name})")
    with pytest.raises(fxq.TraceError, match=rf"^argument `{name}` has the name of .*; give it another name"):
        quantize(model_of(forward, l=nn.Linear(6, 6)), X)


def test_a_word_of_pythons_inside_a_leaf(model_of):
    parts = nn.ModuleDict({"in": nn.Linear(6, 6), "class": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))})
    model = model_of(lambda self, x: self.parts["class"](self.parts["in"](x)), parts=parts)
    qmodel = fxq.quantize(model, X, frontend="leaf", progress=False)
    assert {d.module for d in qmodel.report.decisions if d.form == "int8"} >= {"parts.in", "parts.class.0"}
    assert torch.equal(copy.deepcopy(qmodel)(X), qmodel(X))
