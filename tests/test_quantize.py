"""fxq.quantize end to end: what it returns, what it says, what it refuses, and what it leaves alone."""

import copy
import io
import pickle
import threading
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import tracing
from fxq.graph import is_call
from fxq.pipeline import Context, begin, run
from fxq.recipe import FLOAT, Recipe, Rule

X = torch.randn(32, 8)


@dataclass
class Given:
    """What a model may be given."""

    y: torch.Tensor


def mlp(**options):
    return nn.Sequential(nn.Linear(8, 16, **options), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def fresh(inputs):
    return [x.clone() for x in inputs]


def test_a_forward_of_ones_own_is_what_a_call_runs():
    qmodel = fxq.quantize(mlp(), X)
    expected, own = qmodel(X), qmodel.forward
    qmodel.forward = lambda x: own(x) + 1
    assert torch.equal(qmodel(X), expected + 1)


HOOKS = {
    "behind": lambda model, hook: model.register_forward_hook(hook),
    "behind, with keywords": lambda model, hook: model.register_forward_hook(hook, with_kwargs=True),
    "before": lambda model, hook: model.register_forward_pre_hook(hook),
    "behind any": lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    "before any": lambda _, hook: nn.modules.module.register_module_forward_pre_hook(hook),
}


@pytest.mark.parametrize("place", HOOKS)
def test_hooks_run(place):
    qmodel, met = fxq.quantize(mlp(), X), []
    expected = qmodel(X)
    handle = HOOKS[place](qmodel, lambda module, *rest: met.append(module))
    try:
        assert torch.equal(qmodel(X), expected)
    finally:
        handle.remove()
    assert met == [qmodel]


def test_a_hook_runs_where_the_model_fails():
    qmodel, met = fxq.quantize(mlp(), X), []
    qmodel.register_forward_hook(lambda *_: met.append(1), always_call=True)
    with pytest.raises(RuntimeError, match=r"x\[32, 7\]"):
        qmodel(X[:, :7])
    assert met == [1]


def test_a_compiled_call_is_what_a_call_runs():
    torch._dynamo.reset()
    qmodel, met = fxq.quantize(mlp(), X), []
    expected = qmodel(X)
    qmodel.compile(backend=lambda gm, inputs: met.append(gm) or gm.forward)
    assert torch.equal(qmodel(X), expected) and len(met) == 1
    assert torch.equal(copy.deepcopy(qmodel)(X), expected)


def test_a_call_that_someone_has_replaced(monkeypatch):
    qmodel, call = fxq.quantize(mlp(), X), nn.Module.__call__
    expected = qmodel(X)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: call(self, *args) + 1)
    assert torch.equal(qmodel(X), expected + 1)


@pytest.fixture
def untouched(fingerprint):
    """Run something with a model and check that the model is what it was, whatever happens."""

    def check(model, action):
        before = fingerprint(model)
        modes = [m.training for m in model.modules()]
        try:
            return action(model)
        finally:
            assert fingerprint(model) == before
            assert [m.training for m in model.modules()] == modes

    return check


class TestResult:
    def test_the_zoo(self, zoo, untouched):
        qmodel = untouched(zoo.model, lambda m: fxq.quantize(m, zoo.inputs, check=True))
        assert isinstance(qmodel, torch.fx.GraphModule)
        assert qmodel.report.sqnr >= 25
        assert qmodel.report.int8_share > 0.5
        with torch.no_grad():
            expected, actual = zoo.model(*fresh(zoo.inputs)), qmodel(*fresh(zoo.inputs))
        assert torch.utils._pytree.tree_structure(expected) == torch.utils._pytree.tree_structure(actual)
        assert [(x.shape, x.dtype) for x in leaves(expected)] == [(x.shape, x.dtype) for x in leaves(actual)]

    def test_the_completeness_law(self, zoo):
        """Each call of the normalised float graph is in the report exactly once."""
        from passes import PREPARE

        gm = tracing.trace(zoo.model, zoo.inputs, {})
        ctx = Context(Recipe(), (), fxq.inputs.Call(zoo.inputs))
        begin(gm, ctx)
        run(PREPARE[: [step.name for step in PREPARE].index("annotate")], gm, ctx)
        decisions = fxq.quantize(zoo.model, zoo.inputs).report.decisions
        assert Counter(d.node for d in decisions) == Counter(node.name for node in gm.graph.nodes if is_call(node))

    @pytest.mark.parametrize("rows", [0, 1, 3, 100])
    def test_other_batch_sizes(self, rows):
        model = mlp()
        qmodel = fxq.quantize(model, X)
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert qmodel(x).shape == (rows, 3)
            assert rows == 0 or (qmodel(x) - model(x)).abs().max() < 0.3

    def test_a_row_does_not_depend_on_its_batch(self):
        qmodel = fxq.quantize(mlp(), X)
        assert torch.equal(qmodel(X)[5:6], qmodel(X[5:6]))

    def test_keywords_and_nested_outputs(self, keyword_model, untouched):
        model, args, kwargs = keyword_model
        qmodel = untouched(model, lambda m: fxq.quantize(m, args, example_kwargs=kwargs, check=True))
        other = torch.randn(5, 8)
        with torch.no_grad():
            expected = model(other, scale=2.0, y=other)
            actual = qmodel(other, scale=2.0, y=other)
        assert list(actual) == list(expected)
        assert actual["scaled"][1] is None
        assert actual["n"] == 5
        assert fxq.comparison.output_sqnr(expected, actual) > 15

    def test_a_dict_of_keywords(self, model_of):
        model = model_of(lambda s, x, y: s.l(x) + y, l=nn.Linear(8, 8))
        qmodel = fxq.quantize(model, {"x": X, "y": X})
        assert torch.equal(qmodel(X, X), qmodel(y=X, x=X))

    def test_its_code_can_be_read(self):
        code = fxq.quantize(mlp(), X).code
        assert "torch.ops.fxq." in code
        assert "def forward(self, input" in code
        assert "qlinear" in code

    def test_modes_and_threads(self):
        qmodel = fxq.quantize(mlp(), X)
        expected = qmodel(X)
        with torch.inference_mode():
            assert torch.equal(qmodel(X), expected)
        with torch.no_grad():
            assert torch.equal(qmodel(X), expected)
        assert torch.equal(qmodel(X.clone().requires_grad_()), expected)
        assert torch.equal(qmodel.train()(X), expected)
        assert torch.equal(qmodel(X.t().contiguous().t()), expected)
        found = [None] * 4

        def work(i):
            for _ in range(20):
                found[i] = qmodel(X)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for result in found)

    def test_quantizing_twice_gives_the_same_bits(self):
        model = mlp()
        a, b = fxq.quantize(model, X), fxq.quantize(model, X)
        assert torch.equal(a(X), b(X))
        assert a.code == b.code
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

    def test_a_buffer_that_the_model_modifies(self, model_of, untouched):
        def forward(self, x):
            self.calls.add_(1)
            return self.l(x) + self.calls

        model = model_of(forward, l=nn.Linear(8, 8), calls=torch.zeros(()))
        qmodel = untouched(model, lambda m: fxq.quantize(m, X, calibration_data=[X, X], check=True))
        assert qmodel.calls == 0
        first = qmodel(X)
        torch.testing.assert_close(qmodel(X), first + 1)
        assert model.calls == 0

    def test_inputs_that_the_model_modifies(self, model_of):
        model = model_of(lambda s, x: s.l(x.mul_(2)), l=nn.Linear(8, 8))
        x = X.clone()
        qmodel = fxq.quantize(model, x, calibration_data=[x])
        assert torch.equal(x, X)
        qmodel(x)
        assert torch.equal(x, X * 2)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compile(self, backend):
        torch._dynamo.reset()
        qmodel = fxq.quantize(mlp(), X)
        compiled = torch.compile(qmodel, backend=backend, fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(X), qmodel(X))
            assert torch.equal(compiled(X[:7]), qmodel(X[:7]))

    def test_compile_what_guards_containers_and_sizes(self, model_of):
        """For a second batch torch compiles with sizes that it does not know: what compares them branches on it."""

        def forward(s, x, cache):
            if x.shape[0] == cache[0][0].shape[0] and x.shape[1] != 9:
                x = x * 2
            h = torch.relu(s.l(x)) + cache[0][0]
            return s.m(h), [(keys + 1, values) for keys, values in cache]

        def inputs(batch):
            return torch.randn(batch, 8), [(torch.randn(batch, 8), torch.randn(batch, 8)) for _ in range(2)]

        qmodel = fxq.quantize(model_of(forward, l=nn.Linear(8, 8), m=nn.Linear(8, 8)), inputs(4))
        compiled = torch.compile(qmodel, backend="eager", fullgraph=True)
        for batch in (4, 5, 6):
            call = inputs(batch)
            (y, cache), (expected, kept) = compiled(*call), qmodel(*call)
            assert torch.equal(y, expected) and torch.equal(cache[1][0], kept[1][0])
        (x, _), (_, cache) = inputs(5), inputs(6)
        with pytest.raises(Exception, match=r"shape\[0\]` is True on the example inputs"):
            compiled(x, cache)

    def test_compile_more_models_than_torch_compiles_versions_of_one_function(self):
        for _ in range(torch._dynamo.config.recompile_limit + 1):
            qmodel = fxq.quantize(nn.Linear(8, 8).eval(), X[:, :8])
            compiled = torch.compile(qmodel, backend="eager", fullgraph=True)
            assert torch.equal(compiled(X[:, :8]), qmodel(X[:, :8]))

    def test_export(self, zoo):
        qmodel = fxq.quantize(zoo.model, zoo.inputs)
        exported = torch.export.export(qmodel, zoo.inputs, strict=False).module()
        assert same(exported(*zoo.inputs), qmodel(*zoo.inputs))


class TestThreeSteps:
    def test_equal_one_step(self, zoo, untouched):
        data = [zoo.inputs, tuple(x * 1.5 for x in zoo.inputs)]
        whole = fxq.quantize(zoo.model, zoo.inputs, calibration_data=data)
        prepared = untouched(zoo.model, lambda m: fxq.prepare(m, zoo.inputs))
        assert fxq.calibrate(prepared, data) is prepared
        steps = fxq.convert(prepared)
        assert same(steps(*fresh(zoo.inputs)), whole(*fresh(zoo.inputs)))
        assert steps.code == whole.code

    def test_calibrating_more_and_converting_again(self):
        prepared = fxq.prepare(mlp(), X)
        fxq.calibrate(prepared, [X])
        first = fxq.convert(prepared)
        fxq.calibrate(prepared, [X * 10])
        second = fxq.convert(prepared)
        assert not torch.equal(first(X), second(X))

    def test_statistics_travel_in_a_state_dict(self):
        torch.manual_seed(3)
        model = mlp()
        one, two = fxq.prepare(model, X), fxq.prepare(model, X)
        fxq.calibrate(one, [X, X * 2])
        two.load_state_dict(one.state_dict())
        assert torch.equal(fxq.convert(one)(X), fxq.convert(two)(X))

    @pytest.mark.parametrize("prepare", [fxq.prepare, fxq.prepare_qat])
    def test_a_pickle_of_a_prepared_model_gives_its_numbers(self, prepare):
        model = mlp()
        one, two = fxq.calibrate(prepare(model, X), [X, X * 2]), prepare(model, X)
        pickled = pickle.loads(pickle.dumps(one))
        with pytest.raises(fxq.InputError, match=r"load_state_dict\(pickled.state_dict\(\)\)"):
            fxq.convert(pickled)
        two.load_state_dict(pickled.state_dict())
        assert torch.equal(fxq.convert(one)(X), fxq.convert(two)(X))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_prepared_model_of_another_dtype(self, dtype):
        prepared = fxq.calibrate(fxq.prepare(mlp(), X), [X]).to(dtype)
        for step in (fxq.convert, lambda model: fxq.calibrate(model, [X])):
            with pytest.raises(fxq.InputError, match=rf"is {dtype}, and was torch.float32 when the model was prepared"):
                step(prepared)
        assert fxq.convert(prepared.float())(X).dtype == torch.float32

    def test_steps_out_of_order(self):
        prepared = fxq.prepare(mlp(), X)
        with pytest.raises(fxq.CalibrationError, match="was never computed while calibrating"):
            fxq.convert(prepared)
        qmodel = fxq.quantize(mlp(), X)
        for wrong in (mlp(), qmodel, fxq.trace(mlp(), X), 3):
            with pytest.raises(fxq.InputError, match=r"takes what fxq.prepare returns"):
                fxq.calibrate(wrong, [X])
            with pytest.raises(fxq.InputError, match=r"takes what fxq.prepare returns"):
                fxq.convert(wrong)


class TestCalibrationData:
    def test_forms(self):
        model = mlp()
        batches = list(X.split(8))
        expected = fxq.quantize(model, X, calibration_data=batches)(X)
        labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(32)), batch_size=8)
        for data in (tuple(batches), (b for b in batches), [(b,) for b in batches], labelled):
            assert torch.equal(fxq.quantize(model, X, calibration_data=data)(X), expected)
        assert torch.equal(
            fxq.quantize(model, {"input": X}, calibration_data=[{"input": b} for b in batches])(X), expected
        )

    def test_the_examples_are_the_default(self):
        model = mlp()
        assert torch.equal(fxq.quantize(model, X)(X), fxq.quantize(model, X, calibration_data=[X])(X))

    def test_empty(self, untouched):
        for data in ([], iter(())):
            with pytest.raises(fxq.CalibrationError, match="calibration_data is empty: give at least one batch"):
                untouched(mlp(), lambda m, data=data: fxq.quantize(m, X, calibration_data=data))

    def test_a_bad_batch_is_named(self, untouched):
        bad = X.clone()
        bad[3, 1] = float("nan")
        with pytest.raises(fxq.CalibrationError, match=r"calibration batch 2: input 0 holds nan at flat index 25"):
            untouched(mlp(), lambda m: fxq.quantize(m, X, calibration_data=[X, X, bad]))

    def test_infinity_inside_names_the_layer(self, model_of, untouched):
        model = model_of(lambda s, x: s.k(s.l(x).exp().cumsum(0)), l=nn.Linear(8, 8), k=nn.Linear(8, 8))
        with pytest.raises(fxq.CalibrationError, match=r"calibration batch 1: the input of k holds NaN or infinity"):
            untouched(model, lambda m: fxq.quantize(m, X, calibration_data=[X, X * 1e4]))

    @pytest.mark.parametrize(
        "bad", [torch.randn(4, 9), torch.randn(4, 8).double(), torch.zeros(4, 8, dtype=torch.long), "text"]
    )
    def test_a_batch_that_does_not_fit_is_named(self, bad, untouched):
        with pytest.raises(fxq.InputError, match="calibration batch 1"):
            untouched(mlp(), lambda m: fxq.quantize(m, X, calibration_data=[X, bad]))

    def test_data_that_is_no_iterable(self):
        with pytest.raises(fxq.InputError, match="calibration_data"):
            fxq.quantize(mlp(), X, calibration_data=3)

    def test_interrupted(self, untouched):
        def data():
            yield X
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            untouched(mlp(), lambda m: fxq.quantize(m, X, calibration_data=data()))

    def test_progress(self, capsys):
        fxq.quantize(mlp(), X, calibration_data=[X] * 3, progress=True)
        assert "calibrating" in capsys.readouterr().err
        fxq.quantize(mlp(), X, calibration_data=[X] * 3, progress=False)
        assert capsys.readouterr().err == ""


def on_meta():
    return nn.Linear(8, 8, device="meta")


def with_nan():
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")
    return model


def with_inf_bias():
    model = mlp()
    model[4].bias.data[0] = float("inf")
    return model


BAD = {
    "not a module": (lambda: "model", X, {}, fxq.InputError, "the model is a str; fxq needs a torch.nn.Module"),
    "already quantized": (lambda: fxq.quantize(mlp(), X), X, {}, fxq.InputError, "already quantized .* float model"),
    "already prepared": (lambda: fxq.prepare(mlp(), X), X, {}, fxq.InputError, "already prepared .* fxq.calibrate"),
    "too many arguments": (mlp, (X, X), {}, fxq.InputError, "do not fit|too many"),
    "no arguments": (mlp, (), {}, fxq.InputError, "example_inputs is empty"),
    "unknown keyword": (mlp, {"x": X}, {}, fxq.InputError, "do not fit|unexpected"),
    "float64 examples": (mlp, X.double(), {}, fxq.InputError, r"input 0 has dtype torch.float64.*\.float\(\)"),
    "bfloat16 examples": (mlp, X.bfloat16(), {}, fxq.InputError, r"input 0 has dtype torch.bfloat16"),
    "integer examples": (mlp, X.long(), {}, fxq.InputError, "fails on the example inputs"),
    "wrong width": (mlp, torch.randn(2, 9), {}, fxq.InputError, "fails on the example inputs"),
    "examples on another device": (mlp, X.to("meta"), {}, fxq.InputError, r"input 0 is on the device meta.*\.cpu\(\)"),
    "model on another device": (on_meta, X, {}, fxq.InputError, "parameter weight is on the device meta"),
    "float64 model": (
        lambda: mlp().double(),
        X,
        {},
        fxq.InputError,
        r"parameter 0.weight has dtype torch.float64.*\.float\(\)",
    ),
    "half model": (lambda: mlp().half(), X, {}, fxq.InputError, "parameter 0.weight has dtype torch.float16"),
    "NaN in the examples": (mlp, X * float("nan"), {}, fxq.CalibrationError, "example_inputs: input 0 holds nan"),
    "NaN weight": (with_nan, X, {}, fxq.CalibrationError, "the parameter 2.weight holds NaN or infinity; repair"),
    "infinite bias": (with_inf_bias, X, {}, fxq.CalibrationError, "the parameter 4.bias holds NaN or infinity; repair"),
    "K too long": (
        lambda: nn.Linear(66312, 1),
        torch.zeros(1, 66312),
        {},
        fxq.QuantizationError,
        "K = 66312 exceeds 66311",
    ),
    "unknown recipe": (mlp, X, {"recipe": "w4a4"}, fxq.RecipeError, "unknown recipe 'w4a4'"),
    "unknown module": (
        mlp,
        X,
        {"recipe": Recipe(modules={"9": FLOAT})},
        fxq.RecipeError,
        "'9' matches nothing in the model",
    ),
    "unknown family": (
        mlp,
        X,
        {"recipe": Recipe(ops={"conv9": FLOAT})},
        fxq.RecipeError,
        "'conv9' does not exist",
    ),
    "keys that are no names": (mlp, {0: X}, {}, fxq.InputError, "wrap a dict"),
    "a list of nothing": (mlp, [], {}, fxq.InputError, "example_inputs is empty"),
}


class TestBadInput:
    @pytest.mark.filterwarnings("ignore::fxq.tracing.TracingWarning")
    @pytest.mark.parametrize("name", BAD)
    def test_refused(self, name, untouched):
        make, inputs, options, error, message = BAD[name]
        assert issubclass(error, fxq.FxqError)
        model = make()
        if not isinstance(model, nn.Module) or name == "model on another device":
            with pytest.raises(error, match=message):
                fxq.quantize(model, inputs, **options)
            return
        with pytest.raises(error, match=message):
            untouched(model, lambda m: fxq.quantize(m, inputs, **options))

    def test_strict(self, model_of, untouched):
        model = model_of(lambda s, x: F.linear(s.c(x[:, None])[:, 0], s.l(x)), l=nn.Linear(8, 8), c=nn.Conv1d(1, 1, 1))
        with pytest.warns(fxq.KeptFloatWarning, match="1 linear operations stay float"):
            fxq.quantize(model, X)
        with pytest.raises(fxq.QuantizationError, match=r"(?s)strict=True, and 1 operations .*DYNAMIC_WEIGHT"):
            untouched(model, lambda m: fxq.quantize(m, X, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fxq.quantize(mlp(), X, strict=True)
            fxq.quantize(mlp(), X, strict=True, recipe=Recipe(modules={"0": FLOAT}))

    def test_a_low_sqnr(self, untouched):
        model = mlp()
        with pytest.warns(
            fxq.AccuracyWarning, match=r"(?s)below 99.0 dB; the worst layers:\n.* dB alone.*Recipe\(modules"
        ):
            fxq.quantize(model, X, min_sqnr=99)
        with pytest.raises(fxq.QuantizationError, match=r"below 99.0 dB"):
            untouched(model, lambda m: fxq.quantize(m, X, min_sqnr=99, on_low_sqnr="error"))
        assert fxq.quantize(model, X, min_sqnr=99, on_low_sqnr="ignore").report.sqnr < 99

    def test_a_model_in_training_mode(self, untouched):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).train()
        with pytest.warns(tracing.TracingWarning, match="training mode"):
            qmodel = untouched(model, lambda m: fxq.quantize(m, X))
        assert torch.equal(qmodel(X), qmodel(X))

    def test_a_broken_promise_of_a_pass_is_found(self):
        from dataclasses import dataclass

        from passes import CONVERT, PREPARE, remove_identities

        @dataclass(frozen=True)
        class Broken(remove_identities.RemoveIdentities):
            name: str = "broken"

            def run(self, gm, ctx):
                gm.get_parameter("0.bias").data.add_(1)
                return 1

        steps = ((Broken(), *PREPARE), CONVERT)
        with pytest.raises(fxq.VerifyError, match="pass 'broken' promises 'same bits', and output 0 of 1 differs by"):
            fxq.quantize(mlp(), X, passes=steps, check=True)


class TestRecipes:
    def test_a_layer_in_float(self):
        model = mlp()
        qmodel = fxq.quantize(model, X, recipe=Recipe(modules={"4": FLOAT}))
        head = [d for d in qmodel.report.decisions if d.module == "4"]
        assert [(d.form, d.reason) for d in head] == [("float", fxq.Reason.USER_EXCLUDED)]
        assert qmodel.get_parameter("4.weight").equal(model[4].weight)
        assert qmodel.report.sqnr > fxq.quantize(model, X).report.sqnr - 1

    def test_everything_in_float_is_the_float_model(self):
        model = mlp()
        for recipe in (Recipe(modules={"": FLOAT}), Recipe(ops={"*": FLOAT})):
            qmodel = fxq.quantize(model, X, recipe=recipe)
            assert torch.equal(qmodel(X), model(X))
            assert qmodel.report.int8_share == 0

    def test_per_tensor_weights(self):
        model = mlp()
        model[0].weight.data[0] *= 100
        recipes = (Recipe(observer="min_max", weight=w) for w in ("per_tensor", "per_channel"))
        whole, each = (fxq.quantize(model, X, recipe=recipe) for recipe in recipes)
        assert whole.report.sqnr < each.report.sqnr

    @pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "histogram"])
    def test_observers(self, observer):
        qmodel = fxq.quantize(mlp(), X, recipe=Recipe(observer=observer))
        assert qmodel.report.sqnr > 20

    def test_an_observer_for_one_layer(self):
        model, data = mlp(), [X, X * 3]
        default = fxq.quantize(model, X, calibration_data=data)
        rule = Recipe(modules={"0": Rule(observer="moving_average")})
        averaged = fxq.quantize(model, X, calibration_data=data, recipe=rule)
        assert averaged.report.sqnr > default.report.sqnr  # the examples are X, whose range the average keeps
        other = fxq.quantize(model, X, calibration_data=data, recipe=Recipe(modules={"4": Rule(observer="min_max")}))
        assert other.report.sqnr < averaged.report.sqnr


class TestReport:
    def test_round_trip(self, zoo):
        report = fxq.report(fxq.quantize(zoo.model, zoo.inputs))
        plain = report.to_dict()
        assert fxq.Report.from_dict(plain) == report
        import json

        assert fxq.Report.from_dict(json.loads(json.dumps(plain))) == report
        assert plain["int8_share"] == report.int8_share

    def test_figures(self, model_of):
        model = model_of(lambda s, x: s.l(x) @ x.t(), l=nn.Linear(8, 8))
        report = fxq.report(fxq.quantize(model, X))
        assert report.macs == (32 * 64, 32 * 64 + 32 * 32 * 8)
        assert report.int8_share == 64 / (64 + 256)
        assert report.weight_bytes[0] == 4 * (64 + 8)
        assert [d.op for d in report.kept_float()] == ["transpose", "matmul"]

    def test_it_prints(self):
        text = str(fxq.report(fxq.quantize(mlp(), X, recipe=Recipe(modules={"4": FLOAT}))))
        assert "USER_EXCLUDED: the recipe keeps it float -> remove the rule from the recipe" in text
        assert "dB SQNR" in text
        assert "multiply-accumulates in int8" in text

    def test_of_a_prepared_model_and_of_nothing(self):
        assert len(fxq.report(fxq.prepare(mlp(), X)).decisions) == 5
        with pytest.raises(fxq.InputError, match=r"Sequential was not made by fxq"):
            fxq.report(mlp())

    def test_compare(self):
        model = mlp()
        comparison = fxq.compare(model, fxq.quantize(model, X), X)
        assert [layer.module for layer in comparison.layers if "qlinear" in layer.op] == ["0", "2", "4"]
        assert all(layer.alone > 30 for layer in comparison.layers)
        assert comparison.output > 25
        with pytest.raises(fxq.InputError, match=r"takes what fxq.quantize returns"):
            fxq.compare(model, model, X)


class Doubled(nn.Module):
    def forward(self, x):
        return x.flip(0) * 2


class TestFiles:
    def test_round_trips(self, zoo, tmp_path):
        qmodel = fxq.quantize(zoo.model, zoo.inputs)
        expected = qmodel(*fresh(zoo.inputs))
        stream = io.BytesIO()
        torch.save(qmodel, stream)
        stream.seek(0)
        fxq.save(qmodel, tmp_path / "model.fxq")
        for other in (
            copy.deepcopy(qmodel),
            pickle.loads(pickle.dumps(qmodel)),
            torch.load(stream, weights_only=False),
            fxq.load(tmp_path / "model.fxq"),
        ):
            assert same(other(*fresh(zoo.inputs)), expected)
            assert other.report == qmodel.report
            assert other.code == qmodel.code
            assert other.state_dict().keys() == qmodel.state_dict().keys()
            assert [node.meta.get("qparams") for node in other.graph.nodes] == [
                node.meta.get("qparams") for node in qmodel.graph.nodes
            ]

    def test_state_dict(self):
        torch.manual_seed(5)
        qmodel = fxq.quantize(mlp(), X)
        other = copy.deepcopy(qmodel)
        state = copy.deepcopy(qmodel.state_dict())
        assert state
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))

    def test_a_copy_shares_nothing(self):
        qmodel = fxq.quantize(mlp(), X)
        expected, copied = qmodel(X), copy.deepcopy(qmodel)
        for tensor in copied.state_dict().values():
            tensor.zero_()
        copied.report.notes.append("another")
        assert torch.equal(qmodel(X), expected)
        assert qmodel.report.notes == []

    def test_torch_modules_inside_need_no_trust(self, tmp_path):
        model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(8, 8), nn.LayerNorm(8)).eval()
        x = torch.randn(2, 3, 8)
        qmodel = fxq.quantize(model, x)
        fxq.save(qmodel, tmp_path / "m.fxq")
        assert torch.equal(fxq.load(tmp_path / "m.fxq")(x), qmodel(x))

    def test_attention_and_attributes_of_tensors(self, model_of, tmp_path):
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        model = model_of(lambda s, x: s.a(x, x, x)[0].mT.clone(), a=attention)
        x = torch.randn(2, 5, 8)
        qmodel = fxq.quantize(model, x)
        fxq.save(qmodel, tmp_path / "m.fxq")
        for other in (fxq.load(tmp_path / "m.fxq"), pickle.loads(pickle.dumps(qmodel))):
            assert torch.equal(other(x), qmodel(x))

    def test_tied_embedding(self, model_of, tmp_path):
        model = model_of(lambda s, i: F.linear(s.l(s.e(i)), s.e.weight), l=nn.Linear(8, 8), e=nn.Embedding(10, 8))
        ids = torch.randint(0, 10, (2, 5))
        qmodel = fxq.quantize(model, ids)
        assert len({t.data_ptr() for t in qmodel.state_dict().values()}) == len(qmodel.state_dict())
        assert [name for name in qmodel.state_dict() if name.endswith("_int8")] == ["e.weight_int8"]
        assert not any(t.dtype == torch.float32 and t.numel() == 80 for t in qmodel.state_dict().values())
        fxq.save(qmodel, tmp_path / "m.fxq")
        assert torch.equal(fxq.load(tmp_path / "m.fxq")(ids), qmodel(ids))

    def test_leaf_modules_need_trust(self, tmp_path, monkeypatch):
        import sys
        import types

        module = types.ModuleType("someones_module")
        module.Doubled = Doubled
        monkeypatch.setitem(sys.modules, "someones_module", module)
        monkeypatch.setattr(Doubled, "__module__", "someones_module")
        model = nn.Sequential(nn.Linear(8, 8), Doubled(), nn.Linear(8, 8)).eval()
        qmodel = fxq.quantize(model, X, leaves=(Doubled,))
        fxq.save(qmodel, tmp_path / "m.fxq")
        with pytest.raises(fxq.FileError, match=r"not torch's own; pass trust=True"):
            fxq.load(tmp_path / "m.fxq")
        assert torch.equal(fxq.load(tmp_path / "m.fxq", trust=True)(X), qmodel(X))

    @pytest.mark.parametrize(
        "entry",
        [
            {"op": "call_function", "target": "torch.os.system", "args": ("true",)},
            {"op": "call_function", "target": "builtins.eval", "args": ("1",)},
            {"op": "call_function", "target": "torch.hub.load", "args": ("a", "b")},
            {"op": "call_function", "target": "torch.load", "args": ("a",)},
            {"op": "call_function", "target": "torch.from_file", "args": ("a",)},
            {"op": "call_function", "target": "fxq.kernels.os.system", "args": ("true",)},
            {"op": "call_function", "target": "operator.attrgetter", "args": ("__class__",)},
            {"op": "call_function", "target": "builtins.getattr", "args": ({"$node": "input"}, "__class__")},
            {"op": "call_function", "target": "antigravity.geohash", "args": ()},
            {"op": "call_function", "target": "fxq.tracing.mutate", "args": ({"$node": "input"}, "__reduce__")},
            {"op": "call_method", "target": "__getattribute__", "args": ({"$node": "input"}, "__class__")},
            {"op": "call_method", "target": "numpy", "args": ({"$node": "input"},)},
        ],
    )
    def test_a_file_runs_no_code_without_trust(self, entry, tmp_path):
        path = tmp_path / "m.fxq"
        fxq.save(fxq.quantize(mlp(), X), path)
        data = torch.load(path, weights_only=True)
        first = {"$node": data["nodes"][0]["name"]}
        entry = {**entry, "args": tuple(first if isinstance(arg, dict) else arg for arg in entry["args"])}
        place = {"name": "extra", "kwargs": {"$dict": []}, "origin": None, "value": None, "source": None}
        data["nodes"].insert(1, {**data["nodes"][0], **place, **entry})
        torch.save(data, path)
        with pytest.raises(fxq.FileError, match="no arithmetic of torch's; pass trust=True"):
            fxq.load(path)

    def test_an_attribute_that_needs_trust_is_named(self, model_of, tmp_path):
        model = model_of(lambda self, given: self.l(given.y), l=nn.Linear(6, 6))
        fxq.save(fxq.quantize(model, (Given(torch.randn(4, 6)),)), tmp_path / "m.fxq")
        with pytest.raises(fxq.FileError, match="the file calls or reads 'y' of an object, which is no arithmetic"):
            fxq.load(tmp_path / "m.fxq")
        assert fxq.load(tmp_path / "m.fxq", trust=True)(Given(torch.randn(4, 6))).shape == (4, 6)

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(fxq.FileError, match="no such file"):
            fxq.load(tmp_path / "none.fxq")
        (tmp_path / "text.fxq").write_text("hello")
        torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.fxq")
        torch.save([1, 2], tmp_path / "list.fxq")
        for name in ("text", "foreign", "list"):
            with pytest.raises(fxq.FileError, match=r"not an fxq file"):
                fxq.load(tmp_path / f"{name}.fxq")
        for place in (tmp_path, tmp_path / "nowhere" / "m.fxq"):
            with pytest.raises(fxq.FileError, match=rf"^cannot write {place}: "):
                fxq.save(fxq.quantize(mlp(), X), place)
        with pytest.raises(fxq.FileError, match=r"fxq.save writes what fxq.quantize returns, not a Sequential"):
            fxq.save(mlp(), tmp_path / "m.fxq")

    def test_damaged_files(self, tmp_path):
        path = tmp_path / "m.fxq"
        qmodel = fxq.quantize(mlp(), X)
        fxq.save(qmodel, path)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[whole.index(next(iter(qmodel.state_dict().values())).numpy().tobytes())] ^= 1
        method = whole.index(b"PK\1\2") + 10  # how the first part is compressed
        unknown = whole[:method] + b"\x63" + whole[method + 1 :]
        for damaged in (whole[: len(whole) // 2], whole[:-40], b"", whole[100:], bytes(flipped), unknown):
            path.write_bytes(damaged)
            with pytest.raises(fxq.FileError, match=r"damaged|not an fxq file"):
                fxq.load(path)

    @pytest.mark.parametrize("part", ["version", "nodes", "constants", "modules", "signature", "report"])
    def test_files_whose_parts_are_wrong(self, part, tmp_path):
        path = tmp_path / "m.fxq"
        fxq.save(fxq.quantize(mlp(), X), path)
        data = torch.load(path, weights_only=True)
        missing = {key: value for key, value in data.items() if key != part}
        for held in (missing, *({**data, part: wrong} for wrong in (None, 7, [1.5], "text"))):
            torch.save(held, path)
            with pytest.raises(fxq.FileError, match=r"it is damaged|format version"):
                fxq.load(path)

    @pytest.mark.parametrize("where", ["parameter", "keyword", "path", "dtype"])
    def test_code_in_a_file_is_not_run(self, where, tmp_path):
        path, trace = tmp_path / "m.fxq", tmp_path / "trace"
        fxq.save(fxq.quantize(mlp(), X), path)
        data = torch.load(path, weights_only=True)
        code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
        entries = {entry["op"]: entry for entry in data["nodes"]}
        match where:
            case "parameter":
                entries["placeholder"]["target"] = f"x={code}"
            case "keyword":
                entries["call_function"]["kwargs"] = {"$dict": [(f"x={code}, y", 1)]}
            case "path":
                target = f'program", {code}) or getattr(self, "program'
                data["constants"][target] = data["constants"].pop(entries["get_attr"]["target"])
                entries["get_attr"]["target"] = target
            case _:
                entries["call_function"]["kwargs"] = {"$dict": [("x", {"$torch": "load"})]}
        torch.save(data, path)
        with pytest.raises(fxq.FileError, match=r"where a \w+ belongs; it is damaged, or made to run code|no dtype"):
            fxq.load(path)
        assert not trace.exists()

    def test_another_version(self, tmp_path):
        path = tmp_path / "m.fxq"
        fxq.save(fxq.quantize(mlp(), X), path)
        data = torch.load(path, weights_only=True)
        torch.save({**data, "version": 99}, path)
        with pytest.raises(fxq.FileError, match=r"format version 99, this fxq reads \d+; write it again"):
            fxq.load(path)
