"""equalize: the same numbers in float, channels of like range between two products, and what is left as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import equalize

PLAIN = {"equalize": True, "balance": False, "round_weights": None, "correct_bias": None}


def uneven(first, second):
    """The channels between two products differ a hundredfold, which the second takes back."""
    factors = 10 ** torch.linspace(-1, 1, len(first.weight))
    with torch.no_grad():
        first.weight.mul_(factors.reshape(-1, *[1] * (first.weight.dim() - 1)))
        first.bias.mul_(factors)
        second.weight.div_(factors.reshape(1, -1, *[1] * (second.weight.dim() - 2)))
    return first, second


def linears():
    first, second = uneven(nn.Linear(8, 16), nn.Linear(16, 4))
    return nn.Sequential(first, nn.ReLU(), second)


def peaks(gm, x):
    """Of each channel between the products."""
    values = {}
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(x)
    values = interpreter.env
    between = next(n for n in gm.graph.nodes if n.op == "call_module" and n.args[0].op == "call_function")
    return values[between].abs().transpose(1, -1).flatten(0, -2).amax(0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (linears, (64, 8)),
        (lambda: nn.Sequential(*uneven(nn.Linear(8, 16), nn.Linear(16, 4))), (64, 8)),
        (lambda: nn.Sequential(*uneven(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1))), (8, 3, 9, 9)),
    ],
    ids=["relu", "nothing between", "conv"],
)
def test_channels_get_like_ranges(staged, text, make, shape):
    model, x = make(), torch.randn(shape)
    gm, ctx = staged(model, x, "equalize", Recipe(**PLAIN))
    lines, expected, before = text(gm).splitlines(), gm(x), peaks(gm, x)
    run((equalize.PASS,), gm, ctx)  # check=True holds it to float rounding
    assert ctx.timings[-1][1] == 1
    after = peaks(gm, x)
    assert after.max() / after.min() < 0.2 * before.max() / before.min()
    assert torch.allclose(gm(x), expected, atol=1e-5)
    now = text(gm).splitlines()
    assert [line.replace("_equalized", "") for line in now] == lines
    assert sum("_equalized" in line for line in now) == 3, "two weights and a bias"
    assert ctx.report.decisions[-1].detail.startswith("equalized: ")
    assert equalize.PASS.run(gm, ctx) == 0, "idempotent"


def test_it_pays_and_can_be_switched_off():
    model, data, unseen = linears().eval(), [torch.randn(64, 8) for _ in range(6)], torch.randn(256, 8)
    for observer in ("histogram", "min_max", "percentile"):
        recipes = [Recipe(**{**PLAIN, "equalize": wanted, "observer": observer}) for wanted in (False, True)]
        plain, qmodel = (fxq.quantize(model, data[0], calibration_data=data, recipe=recipe) for recipe in recipes)
        assert "equalized" not in str(fxq.report(plain))
        assert sqnr(model(unseen), qmodel(unseen)) > sqnr(model(unseen), plain(unseen)) + 1
    assert (fxq.golden(qmodel)(unseen.numpy()) == qmodel(unseen).numpy()).all()


def test_chains():
    first, second = uneven(nn.Linear(8, 16), nn.Linear(16, 16))
    second, third = uneven(second, nn.Linear(16, 4))
    model, x, unseen = (
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third),
        torch.randn(256, 8),
        torch.randn(256, 8),
    )
    model.eval()
    plain, qmodel = (fxq.quantize(model, x, recipe=Recipe(**{**PLAIN, "equalize": wanted})) for wanted in (False, True))
    assert [d.detail.startswith("equalized") for d in fxq.report(qmodel).decisions if d.op == "linear"] == [0, 1, 1]
    assert sqnr(model(unseen), qmodel(unseen)) > sqnr(model(unseen), plain(unseen)) + 2


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_get_their_own_factors(staged, monkeypatch, groups):
    """Whether it pays or not, the numbers stay."""
    monkeypatch.setattr(equalize, "LEAST_GAIN", -100)
    first, last = nn.ConvTranspose2d(3, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2)
    model, x = (
        nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(), last),
        torch.randn(4, 3, 6, 6),
    )
    first.weight.data.mul_(10 ** torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))
    gm, ctx = staged(model, x, "equalize", Recipe(**PLAIN))
    run((equalize.PASS,), gm, ctx)
    assert ctx.timings[-1][1] >= 1


def test_the_range_reaches_as_far_as_all_of_the_data(staged):
    gm, ctx = staged(linears(), torch.randn(64, 8), "equalize", Recipe(observer="min_max", **PLAIN))
    observer = next(m for m in gm.observers.children() if hasattr(m, "low") and m.where.startswith("the output"))
    beyond = 3 * observer.high.item()
    observer.high.fill_(beyond)
    before = peaks(gm, ctx.examples.args[0])
    assert equalize.PASS.run(gm, ctx) == 1
    (new,) = [m for m in gm.observers.children() if hasattr(m, "low") and m.where.startswith("the output")]
    after = peaks(gm, ctx.examples.args[0])
    assert new.high.item() / after.max().item() == pytest.approx(beyond / before.max().item(), rel=1e-4)


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def alike():
    """All channels and weights have the same range already."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    model[0].weight.data = torch.eye(8)
    model[2].weight.data = torch.randn(4, 8).sign()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda m: nn.Sequential(linears()[0], nn.ReLU6(), linears()[2]),  # a bound that no factor passes
        lambda m: nn.Sequential(linears()[0], nn.GELU(), linears()[2]),  # nor does this
        lambda m: tied(),  # the weight has another reader
        lambda m: m(
            lambda s, x: (s.l(y := F.relu(s.f(x))), s.k(y)), f=nn.Linear(8, 16), l=nn.Linear(16, 4), k=nn.Linear(16, 4)
        ),
        lambda m: m(lambda s, x: (y := s.f(x), s.l(F.relu(y))), f=nn.Linear(8, 16), l=nn.Linear(16, 4)),
        lambda m: alike(),
    ],
    ids=["clamp", "gelu", "tied", "two readers", "read before", "no gain"],
)
def test_what_is_left_alone(staged, text, model_of, make):
    gm, ctx = staged(make(model_of), torch.randn(64, 8), "equalize", Recipe(**PLAIN))
    before = text(gm)
    assert equalize.PASS.run(gm, ctx) == 0
    assert text(gm) == before


def test_a_dead_channel(staged):
    model = linears()
    model[0].weight.data[3] = 0
    model[0].bias.data[3] = -1
    model[2].weight.data[:, 5] = 0
    x = torch.randn(64, 8)
    qmodel = fxq.quantize(model.eval(), x, recipe=Recipe(**PLAIN))
    assert torch.isfinite(qmodel(x)).all()
    assert "equalized" in str(fxq.report(qmodel))


def test_all_stays_as_it_was_where_the_output_would_lose(staged, text, monkeypatch):
    gm, ctx = staged(linears(), torch.randn(64, 8), "equalize", Recipe(**PLAIN))
    before = text(gm)
    reached = equalize._reached
    assert reached(gm, gm, ctx) > 10, "of the output, in integers"
    monkeypatch.setattr(equalize, "_reached", lambda graph, gm, ctx: -reached(graph, gm, ctx))
    assert equalize.PASS.run(gm, ctx) == 0
    gm.recompile()
    assert text(gm) == before
    assert ctx.report.notes[-1].startswith("equalize: all channels stay as they were: the output would lose ")
    model, x = linears().eval(), torch.randn(64, 8)
    plain, equalized = (fxq.quantize(model, x, recipe=Recipe(**{**PLAIN, "equalize": on})) for on in (False, True))
    assert torch.equal(plain(x), equalized(x))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(linears, (64, 8)), (lambda: nn.Sequential(*uneven(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))), (8, 3, 9, 9))],
    ids=["relu", "conv"],
)
def test_compared_in_the_units_of_the_float_model(make, shape, tmp_path):
    model, x = make().eval(), torch.randn(shape)
    qmodel = fxq.quantize(model, x, recipe=Recipe(**PLAIN))
    assert "equalized" in str(fxq.report(qmodel))
    fxq.save(qmodel, tmp_path / "model.fxq")
    for made in (qmodel, fxq.load(tmp_path / "model.fxq")):
        layers = fxq.compare(model, made, x).layers
        assert len(layers) == 3
        assert all(layer.alone > 30 and layer.accumulated > 30 for layer in layers)
        between = layers[1].spread
        assert between is not None and between.clipped < 0.01
