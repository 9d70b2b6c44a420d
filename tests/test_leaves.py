"""Modules that cannot be traced become leaves, and what can be traced in them becomes int8."""

import copy
import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.decisions import Reason
from fxq.graph import is_call

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) + 0.1
DATA = [X + shift for shift in (-2, 0, 2)]

pytestmark = pytest.mark.filterwarnings("ignore::fxq.api.KeptFloatWarning", "ignore::fxq.api.AccuracyWarning")


def linear(n=16, m=16):
    return nn.Linear(n, m)


class Branching(nn.Module):
    """Takes one of two branches, by the data."""

    def __init__(self):
        super().__init__()
        self.positive = nn.Sequential(linear(), nn.ReLU(), linear())
        self.negative = linear()

    def forward(self, x):
        return self.positive(x) if x.sum() > 0 else self.negative(x)  # the decision


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = linear(), inner, linear(16, 4)

    def forward(self, x):
        return self.last(F.relu(self.inner(self.first(x))))


def net(inner):
    return Net(inner).eval()


def decisions(qmodel, module):
    return [d for d in fxq.report(qmodel).decisions if d.module == module]


def is_int8(qmodel, module):
    return {d.form for d in decisions(qmodel, module)} == {"int8"}


def test_the_innermost_module_becomes_a_leaf():
    gm = fxq.trace(nn.Sequential(linear(), nn.Sequential(Branching(), linear()), Branching()).eval(), X)
    calls = {str(node.target): node.meta.get("untraceable", "") for node in gm.graph.nodes if is_call(node)}
    assert list(calls) == ["0", "1.0", "1.1", "2"]
    assert calls["0"] == calls["1.1"] == ""
    for path in ("1.0", "2"):
        assert "test_leaves.py:" in calls[path]
        assert f"(module '{path}') needs the value of a tensor for Python" in calls[path]


def test_a_module_whose_leaf_cannot_be_a_node_becomes_the_leaf_itself():
    class Count(nn.Module):
        def forward(self, x):
            return int((x > 0).sum())

    class Repeat(nn.Module):
        def __init__(self):
            super().__init__()
            self.count, self.l = Count(), linear()

        def forward(self, x):
            return self.l(x) if self.count(x) > 3 else x

    gm = fxq.trace(net(Repeat()), X)
    assert [n.target for n in gm.graph.nodes if "untraceable" in n.meta] == ["inner"]


def test_both_branches_are_integers_where_the_data_reach_both():
    model = net(Branching())
    qmodel = fxq.quantize(model, X, calibration_data=DATA)
    assert all(is_int8(qmodel, path) for path in ("first", "inner.positive.0", "inner.positive.2", "inner.negative"))
    (leaf,) = decisions(qmodel, "inner")
    assert (leaf.form, leaf.reason, leaf.macs) == ("float", Reason.UNTRACEABLE, 0)
    assert "test_leaves.py:" in leaf.detail
    report = fxq.report(qmodel)
    assert report.int8_share == 1
    assert report.weight_bytes[1] < 0.6 * report.weight_bytes[0]
    names = [d.node for d in report.decisions]
    assert len(names) == len(set(names))
    for x in (X[:3] + 1, X[:5] - 1):
        assert fxq.compare(model, qmodel, x).output > 25
        assert not any(parameter.is_floating_point() for parameter in qmodel.inner.parameters())


def test_a_branch_that_no_data_reach_stays_float_and_works():
    model = net(Branching())
    qmodel = fxq.quantize(model, X)
    reached = "positive" if model.first(X).sum() > 0 else "negative"
    assert any(d.module.startswith(f"inner.{reached}") for d in fxq.report(qmodel).decisions)
    assert not any(d.module.startswith("inner.") and reached not in d.module for d in fxq.report(qmodel).decisions)
    notes = [note for note in fxq.report(qmodel).notes if "neither the examples nor the calibration data" in note]
    assert len(notes) == (1 if reached == "positive" else 2)
    for x in (X + 2, X - 2):
        assert qmodel(x).shape == model(x).shape


def test_three_steps_do_the_same():
    model = net(Branching())
    prepared = fxq.prepare(model, X)
    assert any(d.form == "int8" and d.module.startswith("inner.") for d in fxq.report(prepared).decisions)
    fxq.calibrate(prepared, DATA)
    first, second = fxq.convert(prepared), fxq.convert(prepared)
    expected = fxq.quantize(model, X, calibration_data=DATA)
    for x in DATA:
        assert torch.equal(first(x), expected(x))
        assert torch.equal(second(x), expected(x))


def test_the_examples_are_not_calibration_data():
    model = net(Branching())
    near = fxq.quantize(model, X, calibration_data=DATA)
    far = fxq.quantize(model, 100 * X, calibration_data=DATA, on_low_sqnr="ignore")
    for x in DATA:
        assert torch.equal(near(x), far(x))


def test_the_result_can_be_copied_pickled_and_saved(tmp_path):
    qmodel = fxq.quantize(net(Branching()), X, calibration_data=DATA)
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    fxq.save(qmodel, tmp_path / "model.fxq")
    with pytest.raises(fxq.FileError, match="trust=True"):
        fxq.load(tmp_path / "model.fxq")
    twins = [
        copy.deepcopy(qmodel),
        torch.load(buffer, weights_only=False),
        fxq.load(tmp_path / "model.fxq", trust=True),
    ]
    for twin in twins:
        assert str(fxq.report(twin)) == str(fxq.report(qmodel))
        assert twin.state_dict().keys() == qmodel.state_dict().keys()
        for x in DATA:
            assert torch.equal(twin(x), qmodel(x))
    fxq.draw(qmodel, tmp_path / "model.dot")
    golden = fxq.golden(qmodel, islands="torch")
    assert np.array_equal(golden(X.numpy()), qmodel(X).numpy())


def test_the_users_model_is_as_before(fingerprint):
    model = net(Branching())
    before = fingerprint(model)
    fxq.quantize(model, X, calibration_data=DATA)
    assert fingerprint(model) == before


def test_numpy_in_the_middle():
    class Round(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            return self.b(torch.from_numpy(np.tanh(self.a(x).numpy())))

    qmodel = fxq.quantize(net(Round()), X)
    assert is_int8(qmodel, "inner.a")
    assert is_int8(qmodel, "inner.b")
    assert fxq.report(qmodel).sqnr > 25


def test_torch_cond():
    class Cond(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    gm = fxq.trace(net(Cond()), X)
    assert [n.target for n in gm.graph.nodes if "untraceable" in n.meta] == ["inner"]


def test_what_torch_export_captures_is_int8_as_a_whole(tmp_path):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            return self.b(torch.vmap(self.a)(x))

    qmodel = fxq.quantize(net(Mapped()), X)
    assert isinstance(qmodel.inner, fxq.QuantizedModule)
    assert fxq.report(qmodel).int8_share == 1
    fxq.save(qmodel, tmp_path / "model.fxq")
    for twin in (copy.deepcopy(qmodel), fxq.load(tmp_path / "model.fxq")):  # It holds no class of the user's.
        assert torch.equal(twin(X[:3]), qmodel(X[:3]))


def test_scripted_modules_stay_float():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(linear(), nn.ReLU()))
    qmodel = fxq.quantize(net(scripted), X)
    assert [(d.form, d.reason) for d in decisions(qmodel, "inner")] == [("float", Reason.LEAF_MODULE)]


def test_leaves_of_the_user_stay_float():
    model = net(Branching())
    qmodel = fxq.quantize(model, X, calibration_data=DATA, leaves=("inner.positive", "last"))
    assert isinstance(qmodel.inner.positive[0], nn.Linear)
    assert is_int8(qmodel, "inner.negative")
    nothing = fxq.quantize(model, X, calibration_data=DATA, leaves=(Branching,))
    assert isinstance(nothing.inner.negative, nn.Linear)
    assert [(d.form, d.reason) for d in decisions(nothing, "inner")] == [("float", Reason.LEAF_MODULE)]


def test_recipes_speak_of_modules_inside():
    recipe = fxq.Recipe(modules={"inner.positive.0": fxq.FLOAT, "inner.negative": fxq.FLOAT})
    qmodel = fxq.quantize(net(Branching()), X, calibration_data=DATA, recipe=recipe)
    (excluded, integer) = (decisions(qmodel, f"inner.positive.{i}") for i in (0, 2))
    assert [d.reason for d in excluded] == [Reason.USER_EXCLUDED]
    assert [d.form for d in integer] == ["int8"]
    assert isinstance(qmodel.inner.negative, nn.Linear)


def test_a_leaf_that_reads_the_weight_of_a_module_keeps_it():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            assert x.numpy().dtype == np.float32
            return self.b(self.a(x.to(self.a.weight.dtype)))

    qmodel = fxq.quantize(net(Reading()), X)
    assert isinstance(qmodel.inner.a, nn.Linear)
    assert is_int8(qmodel, "inner.b")
    assert any("inner.a stays float" in note for note in fxq.report(qmodel).notes)


def test_a_sequential_that_the_leaf_walks_through_and_leaves_in_leaves():
    class Walking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(linear(), Branching(), linear())

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if x.sum() > -1e9 else x
            return x

    qmodel = fxq.quantize(net(Walking()), X, calibration_data=DATA)
    paths = ("inner.layers.0", "inner.layers.1.positive.0", "inner.layers.1.negative", "inner.layers.2")
    assert all(is_int8(qmodel, path) for path in paths)


def test_a_module_called_in_several_ways_stays_float():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Flag()

        def forward(self, x):
            return self.block(self.block(x, True) if x.sum() > -1e9 else x, False)

    class Flag(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = linear()

        def forward(self, x, flag):
            return F.relu(self.l(x)) if flag else self.l(x)

    model = net(Twice())
    qmodel = fxq.quantize(model, X, calibration_data=DATA)
    assert is_int8(qmodel, "inner.block.l")
    assert fxq.compare(model, qmodel, X[:3]).output > 20


def test_strict_names_what_a_leaf_keeps():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return x @ self.w if x.sum() > -1e9 else x

    with pytest.raises(fxq.QuantizationError, match=r"inner  Own  UNTRACEABLE  test_leaves.py:\d+"):
        fxq.quantize(net(Own()), X, strict=True)
    fxq.quantize(net(Branching()), X, calibration_data=DATA, strict=True)


def test_what_the_error_at_the_root_advises_works():
    model = Branching().eval()
    with pytest.raises(fxq.TraceError, match=r"test_leaves.py:\d+ .*pass frontend='leaf'"):
        fxq.quantize(model, X)
    qmodel = fxq.quantize(model, X, calibration_data=DATA, frontend="leaf")
    assert {d.module for d in qmodel.report.decisions if d.form == "int8"} >= {"negative"}
    for x in DATA:
        assert fxq.comparison.output_sqnr(model(x), qmodel(x)) > 20


class TwoArguments(nn.Module):
    """Decides on data; takes several arguments, one by keyword only, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, y=None, /, *, scale=1.0):
        self.calls.add_(1)
        z = self.up(x) if x.sum() > -1e9 else x
        return {"z": self.down(z if y is None else z + y) * scale, "calls": self.calls.clone()}


def test_a_model_of_several_arguments_as_a_leaf(tmp_path):
    model, x, y = TwoArguments().train(), torch.randn(32, 16), torch.randn(32, 16)
    recipe = fxq.Recipe(modules={"down": fxq.FLOAT})
    with pytest.warns(fxq.tracing.TracingWarning, match="training mode"):
        qmodel = fxq.quantize(model, (x, y), example_kwargs={"scale": 2.0}, frontend="leaf", recipe=recipe)
    assert model.training
    forms = {d.module: d.form for d in qmodel.report.decisions if d.op == "linear"}
    assert forms == {"up": "int8"}  # the rule names the path in the user's model
    assert qmodel.report.frontend == "the model as a leaf, as asked"
    fxq.save(qmodel, tmp_path / "m.fxq")
    expected = model.eval()(x, y, scale=2.0)
    for made in (qmodel, fxq.load(tmp_path / "m.fxq", trust=True)):
        actual = made(x, y, scale=2.0)
        assert fxq.comparison.output_sqnr(expected["z"], actual["z"]) > 30
        assert actual["calls"] == 1
    with pytest.raises(TypeError, match="positional"):
        qmodel(x, y=y)


def test_cost_of_many_leaves_is_two_traces(monkeypatch):
    from fxq.tracing import recorder

    runs = []
    run = recorder.Recorder.run
    monkeypatch.setattr(recorder.Recorder, "run", lambda self, *args: runs.append(1) or run(self, *args))
    fxq.trace(nn.Sequential(*(Branching() for _ in range(12))).eval(), X)
    assert len(runs) == 3  # as it runs, as if compiled, and with the leaves known


@pytest.mark.parametrize("frontend", ["auto", "leaf"])
def test_compare_shows_the_layers_inside(frontend, capfd):
    model = net(Branching())
    with torch.no_grad():
        reached = "positive.0" if model.first(X).sum() > 0 else "negative"
    qmodel = fxq.quantize(model, X, calibration_data=DATA, frontend=frontend)
    layers = {layer.module: layer for layer in fxq.compare(model, qmodel, X).layers}
    assert {"first", "last", f"inner.{reached}"} <= set(layers)
    inside = layers[f"inner.{reached}"]
    assert 25 < inside.accumulated < inside.alone + 1  # what reaches it has been through int8 before
    assert capfd.readouterr().err == ""  # torch.export was tried, and failed without a sound


class Again(nn.Module):
    """Calls one linear on numbers of very different size, `times` times, or as often as the data say."""

    def __init__(self, times=2):
        super().__init__()
        self.l, self.k, self.times = linear(), linear(), times

    def forward(self, x):
        y = self.k(x)
        for _ in range(self.times or (3 if x[0, 0] > 0 else 2)):
            y = self.l(y * 30) if y.sum() > -1e30 else y
        return y


def signed(sign):
    return torch.where(torch.arange(16) == 0, sign, X)


def one_range(qmodel):
    return [d.detail for d in fxq.report(qmodel).decisions if "one range" in d.detail]


def test_each_call_in_a_leaf_has_its_own_range_and_all_have_one_weight(tmp_path):
    model = net(Again())
    qmodel = fxq.quantize(model, X, calibration_data=DATA)
    first, second = decisions(qmodel, "inner.l")
    assert ["call 1 of 2 in the leaf" in first.detail, "call 2 of 2 in the leaf" in second.detail] == [True, True]
    assert first.node != second.node and first.macs == second.macs == decisions(qmodel, "inner.k")[0].macs
    assert not one_range(qmodel)
    calls = list(qmodel.inner.l)
    assert len(calls) == 3  # the last is for calls that there were no data for
    zero_points, weights = [], set()
    for part in calls:
        (quantize,) = [n for n in part.graph.nodes if n.target is fxq.qdq.quantize]
        zero_points.append(quantize.args[1])
        weights.add(next(t for name, t in part.state_dict().items() if name.endswith("weight_packed")).data_ptr())
    assert zero_points[1] > 5 * zero_points[0] and len(weights) == 1
    layers = [layer for layer in fxq.compare(model, qmodel, X).layers if layer.module == "inner.l"]
    assert len(layers) == 4 and all(layer.alone > 30 for layer in layers)  # a quantize and a linear for each call
    fxq.save(qmodel, tmp_path / "model.fxq")
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    read = fxq.load(tmp_path / "model.fxq", trust=True), torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(qmodel), *read):
        for x in (X[:3], X):  # a second call begins to count anew
            assert torch.equal(twin(x), qmodel(x))
    golden = fxq.golden(qmodel, islands="torch")
    assert np.array_equal(golden(X.numpy()), qmodel(X).numpy())


@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace")  # behind the leaf, it says, it runs as it is
def test_calls_in_a_leaf_are_counted_under_torch_compile():
    qmodel = fxq.quantize(net(Again()), X, calibration_data=DATA)
    compiled = torch.compile(qmodel, backend="eager")
    for x in (X[:3], X):
        assert torch.equal(compiled(x), qmodel(x))


def test_calls_in_a_leaf_are_counted_anew_in_each_run_and_thread():
    qmodel = fxq.quantize(net(Again()), X, calibration_data=DATA)
    expected = [qmodel(x) for x in DATA]
    with pytest.raises(RuntimeError):
        qmodel(torch.ones(3, 5))
    broken = qmodel.inner.l[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qmodel(X)  # in the middle of a run
    broken.remove()
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(qmodel, DATA), expected))


def test_calls_in_a_leaf_share_a_range_where_their_number_differs():
    data = [signed(-1.0), signed(1.0)]
    qmodel = fxq.quantize(nn.Sequential(Again(times=0), linear()).eval(), data[0], calibration_data=data)
    detail = "one range for its calls in the leaf, whose number differs from run to run: 2, 3"
    assert [text.endswith(detail) for text in one_range(qmodel)] == [True]


def test_more_calls_in_a_leaf_than_there_were_data_for_use_the_range_of_all():
    model = nn.Sequential(Again(times=0), linear()).eval()
    qmodel = fxq.quantize(model, signed(-1.0))
    assert len(decisions(qmodel, "0.l")) == 2
    third = qmodel.get_submodule("0.l")[2].register_forward_pre_hook(lambda module, args: called.append(module))
    called = []
    qmodel(signed(-1.0))
    assert not called
    qmodel(signed(1.0))
    assert len(called) == 1
    third.remove()


def test_very_many_calls_in_a_leaf_share_a_range():
    qmodel = fxq.quantize(net(Again(times=9)), X / 1e9, on_low_sqnr="ignore")
    assert ["one range for its 9 calls in the leaf, more than 8" in text for text in one_range(qmodel)] == [True]


def test_a_branch_that_only_calibration_reaches_tells_its_calls_apart():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.k = linear(), linear()

        def forward(self, x):
            return self.l(self.l(x)) if x[0, 0] > 0 else self.k(x)

    data = [signed(-1.0), signed(1.0)]
    qmodel = fxq.quantize(nn.Sequential(Rare(), linear()).eval(), data[0], calibration_data=data)
    assert len(decisions(qmodel, "0.l")) == 2 and is_int8(qmodel, "0.l") and is_int8(qmodel, "0.k")


def test_a_leaf_called_twice_tells_all_its_calls_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Again(times=1)

        def forward(self, x):
            return self.inner(self.inner(x) * 100)

    qmodel = fxq.quantize(Two().eval(), X)
    assert len(decisions(qmodel, "inner.l")) == len(decisions(qmodel, "inner.k")) == 2
    assert fxq.compare(Two().eval(), qmodel, X).layers


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = linear()
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x) if x.sum() > -1e30 else x)


def test_a_module_under_two_names_in_a_leaf_is_saved_once(tmp_path):
    qmodel = fxq.quantize(net(Twins()), X)
    fxq.save(qmodel, tmp_path / "model.fxq")
    loaded = fxq.load(tmp_path / "model.fxq", trust=True)
    assert torch.equal(loaded(X), qmodel(X))
    assert loaded.inner.a is loaded.inner.b


class RaisesOnce(nn.Module):
    """Raises at its call `at`, of whatever copy."""

    def __init__(self, at):
        super().__init__()
        self.linear, self.at, self.calls = nn.Linear(8, 8), at, []

    def __deepcopy__(self, memo):
        copied = RaisesOnce(self.at)
        copied.linear, copied.calls = copy.deepcopy(self.linear, memo), self.calls
        return copied.eval()

    def forward(self, x):
        self.calls.append(1)
        if len(self.calls) == self.at:
            raise KeyError("mine")
        return self.linear(x)


def test_what_a_leaf_raises_is_the_users_or_named():
    told = []
    for function in (fxq.trace, fxq.prepare, fxq.prepare_qat):
        for at in range(1, 16):
            model = nn.Sequential(nn.Linear(8, 8), RaisesOnce(at)).eval()
            try:
                function(model, torch.randn(4, 8), leaves=("1",))
            except Exception as error:
                told.append(error)
    assert {type(error) for error in told} == {KeyError, fxq.InputError, fxq.VerifyError}
    assert all("'mine'" in str(error) for error in told)
    place = r"[^\n]*: 1 \(%_1\) raises KeyError in test_leaves.py:\d+: 'mine'(\n|$)"
    assert all(re.match(place, str(error)) for error in told if isinstance(error, fxq.VerifyError))
