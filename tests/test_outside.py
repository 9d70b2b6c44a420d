"""What a forward reads from outside the model is never held for good: clocks, random numbers, gradients, copies."""

import builtins
import copy
import random
import time
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn

import fxq

X = torch.randn(16, 8)


def model_of(forward, **modules):
    """A module in eval mode, of a class of this file."""
    model = type("Model", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, module in modules.items():
        model.add_module(name, module)
    return model.eval()


def grad(s, x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(s.l(z).square().sum(), z)
    return s.l(slope)


OUTSIDE = {
    "time": (lambda s, x: s.l(x) * time.time(), r"test_outside.py:\d+ computes with `time.time\(\)`"),
    "imported": (lambda s, x: s.l(x) + (perf_counter() - 1) / 2, r"computes with `time.perf_counter\(\)`"),
    "decided": (lambda s, x: s.l(x) if time.monotonic() > 0 else x, r"decides on `time.monotonic\(\) > 0`"),
    "random": (lambda s, x: s.l(x) * random.random(), r"computes with `random.random\(\)`"),
    "randint": (lambda s, x: s.l(x)[:, random.randint(0, 3) :], r"computes with `random.randint\(\)`"),
    "numpy": (lambda s, x: s.l(x) * float(np.random.rand()), r"decides on `np.random.rand\(\)`"),
    "array": (lambda s, x: s.l(x) + torch.from_numpy(np.random.rand(8)).float(), "draws numbers from `np.random.rand"),
    "deepcopy": (lambda s, x: copy.deepcopy(s.l)(x), r"copies a module as it runs \(copy.deepcopy\)"),
    "grad": (grad, r"test_outside.py:\d+ computes a gradient \(torch.autograd\)"),
}


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_refused_at_the_root_with_the_line(name, frontend):
    forward, message = OUTSIDE[name]
    with pytest.raises(fxq.TraceError, match=message):
        fxq.quantize(model_of(forward, l=nn.Linear(8, 8)), X, frontend=frontend)


def test_the_remedy_works():
    """The model's code reads its clock at each call."""
    model = model_of(lambda s, x: s.l(x) * time.time(), l=nn.Linear(8, 8))
    qmodel = fxq.quantize(model, X, frontend="leaf", recipe=fxq.Recipe(judge_costs=False))
    assert [d.form for d in fxq.report(qmodel).decisions if d.op == "linear"] == ["int8"]


def test_a_module_that_reads_a_clock_is_a_leaf():
    inner = model_of(lambda s, x: s.l(x) * time.time(), l=nn.Linear(8, 8))
    model = model_of(lambda s, x: s.k(s.inner(x).tanh()), inner=inner, k=nn.Linear(8, 4))
    qmodel = fxq.quantize(model, X, recipe=fxq.Recipe(judge_costs=False))
    (leaf,) = [d for d in fxq.report(qmodel).decisions if d.reason is fxq.Reason.UNTRACEABLE]
    assert leaf.module == "inner"
    assert "computes with `time.time()`" in leaf.detail
    assert qmodel(X).shape == (16, 4)


def test_what_is_only_printed_or_thrown_away_stays():
    def forward(s, x):
        start = time.perf_counter()
        random.random()
        y = s.l(x)
        s.log = f"{time.perf_counter() - start:.3f} s"
        return y

    qmodel = fxq.quantize(model_of(forward, l=nn.Linear(8, 8)), X, recipe=fxq.Recipe(judge_costs=False))
    assert fxq.report(qmodel).int8_share == 1
    assert not any("perf_counter" in str(node.target) for node in qmodel.graph.nodes)


def test_the_functions_are_back_in_their_places():
    before = time.time, random.random, np.random.rand, copy.deepcopy, torch.autograd.grad, perf_counter
    fxq.trace(nn.Linear(8, 8).eval(), X)
    assert (time.time, random.random, np.random.rand, copy.deepcopy, torch.autograd.grad, perf_counter) == before


def test_numpy_product_of_sizes_leaves_them_dynamic():
    model = model_of(lambda s, x: s.l(x.reshape(np.prod(x.shape) // 8, 8)) / np.prod(x.shape), l=nn.Linear(8, 8))
    gm = fxq.trace(model, X)
    assert torch.allclose(gm(X[:5]), model(X[:5]))


def test_a_guard_of_numpy_names_the_users_line():
    model = model_of(lambda s, x: s.l(x) / np.max(x.shape), l=nn.Linear(8, 8))
    with pytest.raises(fxq.GuardError, match=r"test_outside.py:\d+ decided that `x.shape\[0\]` is 16"):
        fxq.trace(model, X)(X[:5])


class Many(nn.Module):
    """Asks for all that is replaced while a model is traced."""

    def __init__(self, width):
        super().__init__()
        self.l, self.kept = nn.Linear(8, width), []

    def forward(self, x):
        self.kept += [print, torch.compile, time.time, copy.deepcopy, torch.autograd.grad, np.prod]
        print(end="")
        return self.l(x + torch.arange(np.prod(x.shape[1:]))).relu()


@pytest.mark.filterwarnings("ignore:.*prints while it is traced")
def test_threads_that_trace_at_once_leave_everything_as_it_was():
    def found():
        return [
            *(builtins.print, torch.compile, time.time, copy.deepcopy, random.random, np.prod, np.random.rand),
            *(torch.autograd.grad, torch.autograd.backward, torch.arange, torch.randn, random.gauss),
            *(torch.compiler.is_compiling(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()),
        ]

    before, models = found(), [Many(width).eval() for width in range(1, 13)]
    with ThreadPoolExecutor(4) as pool:
        traced = list(pool.map(lambda model: fxq.trace(model, X), models))
        copies = list(pool.map(copy.deepcopy, traced))
    assert found() == before
    for model, gm, copied in zip(models, traced, copies, strict=True):
        assert torch.equal(gm(X), model(X)) and torch.equal(copied(X), gm(X))


@pytest.mark.filterwarnings("ignore:.*prints while it is traced")
def test_what_a_model_keeps_of_a_trace_does_nothing_afterwards(recwarn):
    kept = []
    model = model_of(lambda s, x: (kept.extend([print, torch.compile, time.time, copy.deepcopy]), s.l(x))[1])
    model.l = nn.Linear(8, 8)
    fxq.trace(model, X)
    stand_ins = [function for function in kept if function not in (print, torch.compile, time.time, copy.deepcopy)]
    assert stand_ins  # of the last run
    for function in kept:
        argument = {0: (), 1: (model,)}[function in kept[1::4] + kept[3::4]]
        function(*argument)
    assert type(kept[-2]()) is float
    assert not [w for w in recwarn if "prints" in str(w.message)]


@pytest.mark.parametrize("seed", [torch.manual_seed, torch.random.manual_seed])
def test_a_seed_in_forward_is_refused_at_the_root_and_kept_in_a_leaf(seed):
    def forward(s, x):
        seed(5)
        torch.manual_seed(5)
        return s.l(x) + torch.randn(8)

    model = model_of(forward, l=nn.Linear(8, 8))
    for frontend in ("auto", "trace", "export"):
        with pytest.raises(fxq.TraceError, match=r"test_outside.py:\d+ seeds torch's random numbers.*frontend='leaf'"):
            fxq.quantize(model, X, frontend=frontend)
    for qmodel in (
        fxq.quantize(model, X, frontend="leaf"),
        fxq.quantize(model_of(lambda s, x: s.inner(x), inner=model), X),
    ):
        torch.manual_seed(1)
        assert fxq.comparison.output_sqnr(model(X), qmodel(X)) > 20
