"""annotate: which values become integers, and why not; a decision for every call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.decisions import Reason
from fxq.errors import CalibrationError, QuantizationError
from fxq.graph import is_call
from fxq.pipeline import Place, run
from fxq.qtypes import QuantSpec, SharedSpec, WeightSpec
from fxq.recipe import FLOAT, Recipe, Rule
from passes import annotate

X = torch.randn(16, 8)


@pytest.fixture
def annotated(staged, text, model_of):
    """The context and graph of a model after the pass, with the laws that hold for every model checked."""

    def annotate_it(forward, x=X, recipe=None, **members):
        modules = {"l": nn.Linear(8, 8), "m": nn.Linear(8, 8), "k": nn.Linear(8, 8)} | members
        model = forward if isinstance(forward, nn.Module) else model_of(forward, **modules)
        gm, ctx = staged(model, x, "annotate", recipe)
        before = text(gm)
        run((annotate.PASS,), gm, ctx)
        assert text(gm) == before  # nothing in the graph changes
        decisions = ctx.report.decisions
        assert [d.node for d in decisions] == [node.name for node in gm.graph.nodes if is_call(node)]
        assert all(d.reason is not None for d in decisions if d.form in ("float", "aside"))
        assert all(d.reason is None for d in decisions if d.form in ("int8", "moved"))
        specs = dict(ctx.specs)
        assert annotate.PASS.run(gm, ctx) == 0
        assert ctx.specs == specs
        assert ctx.report.decisions == decisions
        return ctx, gm

    return annotate_it


def forms(ctx):
    """`op: form` of all that is not aside."""
    return [(d.op, d.form) for d in ctx.report.decisions if d.form != "aside"]


def activations(ctx):
    """Places of activations, with whether all readers read integers."""
    return [
        (place.value, place.readers is None) for place, spec in ctx.specs.items() if not isinstance(spec, WeightSpec)
    ]


def test_a_chain_hands_on_integers(annotated):
    ctx, gm = annotated(lambda s, x: s.k(F.relu(s.l(x))))
    _, relu, _ = (node.name for node in gm.graph.nodes if is_call(node))
    assert list(ctx.specs.values()) == [QuantSpec("histogram")] * 2 + [WeightSpec("per_channel")] * 2
    assert activations(ctx) == [("x", False), (relu, True)]
    assert forms(ctx) == [("linear", "int8"), ("relu", "int8"), ("linear", "int8")]


CASES = {
    # forward: what becomes of its calls, sizes aside
    "bare": (lambda s, x: s.l(x), "linear int8"),
    "relu out": (lambda s, x: F.relu(s.l(x)), "linear int8, relu float"),
    "relu of relu": (lambda s, x: s.k(s.l(x).relu().relu()), "linear int8, relu int8, relu moved, linear int8"),
    "two readers": (
        lambda s, x: (lambda y: s.k(F.relu(y)) + s.k(y))(s.l(x)),
        "linear int8, relu moved, linear int8, linear int8, add float",
    ),
    "float and integer readers": (
        lambda s, x: (lambda y: s.k(y) * y)(F.relu(s.l(x))),
        "linear int8, relu float, linear int8, mul float",
    ),
    "residual": (lambda s, x: s.k(s.l(x) + x), "linear int8, add int8, linear int8"),
    "residual that is returned": (lambda s, x: s.l(x) + x, "linear int8, add float"),
    "sum of itself": (lambda s, x: (lambda y: s.k(y + y))(s.l(x)), "linear int8, add int8, linear int8"),
    "sum of inputs": (lambda s, x: s.k(x + x), "add float, linear int8"),
    "add of a scalar": (lambda s, x: s.k(s.l(x) + 1), "linear int8, add int8, linear int8"),
    "add that spreads": (
        lambda s, x: s.k(s.l(x) + s.m(x)[:1]),
        "linear int8, linear int8, getitem moved, add int8, linear int8",
    ),
    "add of adds": (lambda s, x: s.k(s.l(x) + x + x), "linear int8, add int8, add int8, linear int8"),
    "cat of pieces": (lambda s, x: s.k(torch.cat([s.l(x), x])), "linear int8, cat moved, linear int8"),
    "cat with a float": (
        lambda s, x: s.k(torch.cat([s.l(x), x.sin()])),
        "linear int8, sin float, cat moved, linear int8",
    ),
    "cat of a float and a read one": (
        lambda s, x: (lambda y: s.k(torch.cat([y, x])) * y.sum())(s.l(x)),
        "linear int8, cat float, linear int8, sum float, mul float",
    ),
    "cat of floats": (lambda s, x: s.k(torch.cat([x.sin(), x])), "sin float, cat float, linear int8"),
    "split half read in float": (
        lambda s, x: (lambda c: s.k4(c[0]) * c[1].sum())(s.l(x).chunk(2, -1)),
        "linear int8, chunk float, getitem float, getitem float, linear int8, sum float, mul float",
    ),
    "split": (
        lambda s, x: (lambda c: s.k4(c[0] + c[1]))(s.l(x).chunk(2, -1)),
        "linear int8, chunk moved, getitem moved, getitem moved, add int8, linear int8",
    ),
    "a split that is returned": (
        lambda s, x: s.l(x).chunk(2, -1),
        "linear int8, chunk float, getitem float, getitem float",
    ),
    "product as weight": (lambda s, x: F.linear(s.l(x), s.m(x)), "linear int8, linear int8, linear float"),
    "bias at run time": (lambda s, x: F.linear(x, s.l.weight, x[0]), "getitem float, linear float"),
    "weight by itself": (
        lambda s, x: F.linear(s.n.weight, s.n.weight) + s.m(x)[:1, :1],
        "linear float, linear int8, getitem float, add float",
    ),
    "constant input": (lambda s, x: s.l(s.m.weight), "linear int8"),
    "dead code": (lambda s, x: (s.k(s.m(x)), s.l(x))[1], "linear int8"),
    "a size of it": (
        lambda s, x: (lambda y: s.k(y).view(y.shape[0], -1))(s.l(x)),
        "linear int8, linear int8, reshape float",
    ),
    "returned twice": (lambda s, x: (lambda y: (y, s.k(y), y))(s.l(x)), "linear int8, linear int8"),
    "matmul of itself": (
        lambda s, x: (lambda y: s.k(y.t() @ y))(s.l(x)),
        "linear int8, transpose float, matmul float, linear int8",
    ),
    "double": (lambda s, x: s.l(x.double().float()), "double float, float float, linear int8"),
    "integers aside": (lambda s, x: s.l(x) * (x > 0), "linear int8, mul float"),
    "sliding window": (
        lambda s, x: s.k(s.l(x).unsqueeze(1).expand(-1, 2, -1)),
        "linear int8, unsqueeze float, expand float, linear int8",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_decisions(name, annotated):
    forward, expected = CASES[name]
    ctx, _ = annotated(forward, k4=nn.Linear(4, 4), n=nn.Linear(2, 9))
    assert ", ".join(f"{op} {form}" for op, form in forms(ctx)) == expected


def test_values_that_are_tied_share_one_range(annotated):
    ctx, _ = annotated(lambda s, x: s.k(torch.cat([s.l(x), s.m(x)]).reshape(-1, 8)))
    owned = [spec for place, spec in ctx.specs.items() if place.readers is None]
    assert [type(spec) for spec in owned] == [QuantSpec, SharedSpec, SharedSpec, SharedSpec]
    assert len({spec.owner for spec in owned[1:]}) == 1


def test_readers_at_an_edge_share_one_observer(annotated):
    ctx, gm = annotated(lambda s, x: s.l(x) + s.m(x))
    linears = tuple(node.name for node in gm.graph.nodes if node.target is F.linear)
    assert Place("x", linears) in ctx.specs


REASONS = {
    Reason.NO_INTEGER_OP: (lambda s, x: s.l(x).cumsum(0), "cumsum"),
    Reason.FLOAT_OPERANDS: (lambda s, x: s.l(x.sin()), "sin"),
    Reason.DYNAMIC_WEIGHT: (lambda s, x: F.linear(x, x), "linear"),
    Reason.NON_FLOAT: (lambda s, x: s.l(x) * (x > 0), "gt"),
    Reason.NOT_FLOAT32: (lambda s, x: s.l(x).double(), "double"),
    Reason.FLOAT_READER: (lambda s, x: F.relu(s.l(x)), "relu"),
    Reason.FLOAT_DATA: (lambda s, x: x.reshape(-1), "reshape"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason, annotated):
    forward, op = REASONS[reason]
    ctx, _ = annotated(forward)
    assert [d.reason for d in ctx.report.decisions if d.op == op] == [reason]


def test_memory_modified_in_place_stays_float(annotated):
    def forward(self, x):
        y = self.l(x)
        v = y.view(-1, 4)
        v[:, 0] = 0
        return self.k(y)

    ctx, _ = annotated(forward)
    assert forms(ctx) == [("linear", "int8"), ("view", "float"), ("mutate", "float"), ("linear", "int8")]
    assert {d.reason for d in ctx.report.decisions if d.form == "float"} == {Reason.ALIASED}
    assert all(place.readers is not None for place in ctx.specs)


def test_a_float64_layer(annotated):
    ctx, _ = annotated(lambda s, x: F.linear(x.double(), s.l.weight.double()).float())
    assert [d.reason for d in ctx.report.decisions if d.op == "linear"] == [Reason.NOT_FLOAT32]


def test_complex_numbers_are_a_float_island_of_the_report(annotated):
    ctx, _ = annotated(lambda s, x: s.m(torch.fft.rfft(s.l(x)).abs()), m=nn.Linear(5, 4))
    (decision,) = [d for d in ctx.report.decisions if "rfft" in d.op]
    assert (decision.form, decision.reason, decision.detail) == (
        "float",
        Reason.NO_INTEGER_OP,
        "it computes complex numbers",
    )
    assert "it computes complex numbers" in str(ctx.report)


class TestRecipes:
    def test_excluded_by_module_and_by_family(self, annotated):
        for recipe in (Recipe(modules={"k": FLOAT}), Recipe(modules={"[k]": FLOAT})):
            ctx, _ = annotated(lambda s, x: s.k(s.l(x)), recipe=recipe)
            assert forms(ctx) == [("linear", "int8"), ("linear", "float")]
            assert ctx.report.decisions[1].reason is Reason.USER_EXCLUDED
        ctx, _ = annotated(lambda s, x: s.k(s.l(x) + x), recipe=Recipe(ops={"add": FLOAT}))
        assert forms(ctx) == [("linear", "int8"), ("add", "float"), ("linear", "int8")]
        ctx, _ = annotated(lambda s, x: s.k(F.relu(s.l(x))), recipe=Recipe(ops={"clamp": FLOAT}))
        assert forms(ctx) == [("linear", "int8"), ("relu", "float"), ("linear", "int8")]
        ctx, _ = annotated(lambda s, x: s.k(s.l(x).reshape(-1, 8)), recipe=Recipe(ops={"carry": FLOAT}))
        assert forms(ctx) == [("linear", "int8"), ("reshape", "float"), ("linear", "int8")]

    def test_observers_and_granularity(self, annotated):
        rule = Rule(observer="min_max", weight="per_tensor")
        ctx, gm = annotated(lambda s, x: s.k(F.relu(s.l(x))), recipe=Recipe(modules={"l": rule}))
        first, _, last = (node.name for node in gm.graph.nodes if is_call(node))
        weights = {
            place.readers[0]: spec.granularity for place, spec in ctx.specs.items() if isinstance(spec, WeightSpec)
        }
        assert weights == {first: "per_tensor", last: "per_channel"}
        assert [spec.observer for spec in ctx.specs.values() if isinstance(spec, QuantSpec)] == ["min_max", "min_max"]

    def test_readers_with_rules_of_their_own(self, annotated):
        recipe = Recipe(modules={"m": Rule(observer="min_max")})
        ctx, gm = annotated(lambda s, x: (s.l(x), s.m(x), s.k(x)), recipe=recipe)
        first, second, third = (node.name for node in gm.graph.nodes if node.target is F.linear)
        assert ctx.specs[Place("x", (first, third))] == QuantSpec("histogram")
        assert ctx.specs[Place("x", (second,))] == QuantSpec("min_max")

    def test_a_shared_range_has_the_observer_of_what_produces_it(self, annotated):
        recipe = Recipe(modules={"l": Rule(observer="min_max")})
        ctx, _ = annotated(lambda s, x: s.k(torch.cat([x, s.l(x)])), recipe=recipe)
        owned = [spec for place, spec in ctx.specs.items() if place.readers is None]
        assert owned[0] == QuantSpec("min_max")

    def test_one_weight_with_two_granularities(self, annotated, model_of):
        inner = model_of(lambda s, x: F.linear(x, s.w), w=nn.Linear(8, 8).weight)
        outer = model_of(lambda s, x: F.linear(s.inner(x), s.inner.w), inner=inner)
        ctx, _ = annotated(outer, recipe=Recipe(modules={"inner": Rule(weight="per_tensor")}))
        specs = [spec.granularity for spec in ctx.specs.values() if isinstance(spec, WeightSpec)]
        assert specs == ["per_tensor", "per_channel"]
        qmodel = fxq.quantize(outer, X, recipe=Recipe(modules={"inner": Rule(weight="per_tensor")}), check=True)
        assert qmodel.report.sqnr > 30


def test_a_dot_product_that_is_too_long(annotated):
    model = nn.Sequential(nn.Linear(66312, 1))
    with pytest.raises(
        QuantizationError, match=r"0 \(%.*K = 66312 exceeds 66311.*Recipe\(modules=\{'0': fxq.FLOAT\}\)"
    ):
        annotated(model, torch.zeros(1, 66312))
    ctx, _ = annotated(model, torch.zeros(1, 66312), recipe=Recipe(modules={"0": FLOAT}))
    assert forms(ctx) == [("linear", "float")]


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite(name, value, annotated):
    linear = nn.Linear(8, 8)
    getattr(linear, name).data.view(-1)[3] = value
    with pytest.raises(CalibrationError, match=rf"the parameter l\.{name} holds NaN or infinity; repair"):
        annotated(lambda s, x: s.l(x), l=linear)


def test_multiply_accumulates(annotated):
    ctx, _ = annotated(lambda s, x: s.k(F.relu(s.l(x))) @ x.t())
    assert [d.macs for d in ctx.report.decisions if d.macs] == [16 * 64, 16 * 64, 16 * 16 * 8]
    assert ctx.report.macs == (2 * 16 * 64, 2 * 16 * 64 + 16 * 16 * 8)


def test_all_of_the_zoo(zoo, annotated):
    ctx, _ = annotated(zoo.model, zoo.inputs)
    assert all(d.form == "int8" for d in ctx.report.decisions if d.op == "linear")
