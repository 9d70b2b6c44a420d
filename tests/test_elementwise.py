"""Functions of one tensor: what counts as one, and that its table has the bits of its operations."""

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import tracing
from fxq.elementwise import span_of
from fxq.expansion import expand_blocks
from fxq.graph import propagate
from fxq.ops.lookup import MAX_CHANNELS, lookup, lookup_channels
from fxq.qdq import dequantize, quantize

X = torch.randn(32, 8)
IMAGE = torch.randn(4, 3, 6, 6)
LAYERS = {"l": nn.Linear(8, 8), "k": nn.Linear(8, 8), "m": nn.Linear(8, 8)}


def targets(qmodel, *wanted):
    return [node for node in expand_blocks(qmodel).graph.nodes if node.target in wanted]


def floats(qmodel):
    return [(d.op, d.reason) for d in qmodel.report.decisions if d.form == "float"]


ONE_TABLE = {
    "x * 2 + 1": lambda x: x * 2 + 1,
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "hardswish": F.hardswish,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3)))),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "where": lambda x: torch.where(x > 0, x, 0.3 * x),
    "masked_fill": lambda x: x.masked_fill(x < -0.5, -0.5),
    "softplus": F.softplus,
    "mish by hand": lambda x: x * torch.tanh(F.softplus(x)),
    "elu, abs, neg": lambda x: -F.elu(x).abs(),
    "in place": lambda x: (x + 1).mul_(0.5).sigmoid_(),
    "numbers before": lambda x: 1 / (1 + (-x).exp()) - 2**x,
    "a tensor of one": lambda x: torch.maximum(x * torch.tensor([0.3]), torch.tensor(0.1)),
    "a square": lambda x: x * x,
    "a clamp behind": lambda x: (x + 0.5).clamp(0, 1),
    "through float64": lambda x: torch.where(x > 0, x, x * 0.1).float(),
}


@pytest.mark.parametrize("name", ONE_TABLE)
@pytest.mark.parametrize("before", ["add", "moves"])
def test_one_table(name, before, model_of):
    function = ONE_TABLE[name]

    def forward(self, x):
        y = self.l(x)
        return self.k(function(y + x if before == "add" else y.reshape(-1, 4).flip(0).reshape(-1, 8)))

    model = model_of(forward, **copy.deepcopy(LAYERS))
    qmodel = fxq.quantize(model, X, check=True)
    assert len(targets(qmodel, lookup)) == 1
    assert floats(qmodel) == []
    golden = fxq.golden(qmodel)
    assert (golden(X.numpy()) == qmodel(X).numpy()).all()
    # The table holds what its operations give for each of the 256 integers.
    (node,) = targets(qmodel, lookup)
    every = dequantize(torch.arange(256, dtype=torch.uint8), *node.args[0].meta["qparams"])
    wanted = quantize(function(every), *node.meta["qparams"])
    assert torch.equal(qmodel.get_buffer(node.args[1].target), wanted)


class Steps:
    """Random functions of one tensor, as spelled by people."""

    UNARY = (
        *(torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.erf, torch.sin, torch.atan, torch.round, torch.floor),
        *(F.silu, F.gelu, F.mish, F.hardswish, F.hardsigmoid, F.elu, F.selu, F.softplus, F.relu6, F.softsign),
        *(F.leaky_relu, F.logsigmoid, F.tanhshrink, F.relu, lambda x: x.square(), lambda x: x.clamp(-1, 0.75)),
        *(lambda x: x.clone().mul_(0.5), lambda x: 1 - x, lambda x: x / 3, lambda x: 0.5 * x + 0.25, lambda x: x**2),
        *(lambda x: torch.where(x > 0.1, x, -0.5), lambda x: x.abs().sqrt(), lambda x: (x > 0) * x, lambda x: x.exp()),
    )
    BINARY = (torch.add, torch.mul, torch.sub, torch.maximum, torch.minimum, lambda a, b: torch.where(a > b, a, b))

    def __init__(self, seed):
        draw = random.Random(seed)
        self.steps = []
        for count in range(1, draw.randint(2, 7)):
            if draw.random() < 0.3:
                self.steps.append((draw.choice(self.BINARY), (draw.randrange(count), draw.randrange(count))))
            else:
                self.steps.append((draw.choice(self.UNARY), (draw.randrange(max(0, count - 2), count),)))

    def __call__(self, x):
        values = {0: x}

        def value(i):
            if i not in values:
                function, operands = self.steps[i - 1]
                values[i] = function(*map(value, operands))
            return values[i]

        return value(len(self.steps))


@pytest.mark.parametrize("seed", range(30))
def test_random_chains_have_the_bits_of_dequantize_function_quantize(seed, model_of):
    function = Steps(seed)
    model = model_of(lambda s, x: s.k(function(s.l(x).flip(0) + x)), **copy.deepcopy(LAYERS))
    qmodel = fxq.quantize(model, X, on_low_sqnr="ignore")
    tables = targets(qmodel, lookup)
    assert len(tables) <= 1
    for node in tables:
        (q_x, _), (s_x, z_x), (s_y, z_y) = node.args, node.args[0].meta["qparams"], node.meta["qparams"]
        q = torch.arange(256, dtype=torch.uint8)
        table = qmodel.get_buffer(node.args[1].target)
        clamped = q_x.target is torch.clamp  # which began the function
        wanted = quantize(function(dequantize(q, s_x, z_x)), s_y, z_y)
        assert clamped or torch.equal(table, wanted)


def span_at_the_end(function, *inputs, **members):
    model = type("Model", (nn.Module,), {"forward": lambda self, *args: function(self, *args)})()
    for name, member in members.items():
        setattr(model, name, member)
    gm = tracing.trace(model.eval(), inputs, {})
    propagate(gm, inputs, {})
    return gm, span_of(gm, gm.graph.output_node().args[0])


CONSTANT = nn.Parameter(torch.randn(8))
NOT_ONE = {
    "two tensors": lambda s, x, y: x * y,
    "two tensors, further up": lambda s, x, y: (x + 1) * (y + 1).sigmoid(),
    "a softmax": lambda s, x, y: torch.softmax(x, -1),
    "its own largest": lambda s, x, y: x / x.amax(),
    "its own mean by row": lambda s, x, y: x - x.mean(-1, keepdim=True),
    "a random mask": lambda s, x, y: F.dropout(x, 0.5, True),
    "noise": lambda s, x, y: torch.rand_like(x),
    "sorted": lambda s, x, y: x.sort(-1)[0],
    "summed up": lambda s, x, y: x.cumsum(0),
    "a constant that spreads it": lambda s, x, y: x[:, :1] * s.c,
    "a constant for each row": lambda s, x, y: x[:8] * s.c[:, None],
    "a constant for each number": lambda s, x, y: x[:8] * s.f,
    "two dimensions of constants": lambda s, x, y: x.view(4, 8, 8) * s.c * s.c[:, None],
    "a size": lambda s, x, y: x * x.shape[0],
    "float64": lambda s, x, y: x.double() * 2,
    "a relu alone": lambda s, x, y: torch.relu(x),
    "clamps alone": lambda s, x, y: torch.clamp(torch.clamp(x, 0, 6), None, 3),
    "a comparison": lambda s, x, y: x > 0,
    "integers": lambda s, x, y: torch.arange(4) + 1,
    "an input that is a number of its own": lambda s, x, y: x * y[0, 0],
    "a module of one's own": lambda s, x, y: s.own(x),
}


class Own(nn.Module):
    def forward(self, x):
        return x if torch.jit.is_scripting() else self.untraceable(x)

    def untraceable(self, x):
        return x * float(x.sum())


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_no_function_of_one_tensor(name):
    members = {"c": CONSTANT, "f": nn.Parameter(torch.randn(8, 8)), "own": Own()}
    _, span = span_at_the_end(NOT_ONE[name], X, X + 1, **members)
    assert span is None or span.nodes[0].target == "untraceable"


def test_the_longest_that_nothing_else_reads():
    gm, span = span_at_the_end(lambda s, x: (x + 1).sigmoid() * 2 - 1, X)
    assert span.source.op == "placeholder" and len(span.nodes) == 4 and len(span.inner()) == 3
    gm, span = span_at_the_end(lambda s, x: (lambda y: (y * 2 - 1, y)[0] + y.sum())(x.sigmoid()), X)
    assert span is None
    model = lambda s, x: (lambda y: torch.stack([y * 2 - 1, y.cumsum(0)])[0])(x.sigmoid())  # noqa: E731
    gm, _ = span_at_the_end(model, X)
    (minus,) = [node for node in gm.graph.nodes if "sub" in node.name]
    span = span_of(gm, minus)
    assert span.source.target == "sigmoid" and len(span.nodes) == 2


def test_a_clamp_that_begins_stays_out():
    _, span = span_at_the_end(lambda s, x: torch.clamp(torch.relu(x), 0, 6).square() + 1, X)
    assert span.source.target is torch.clamp and len(span.nodes) == 2
    _, span = span_at_the_end(lambda s, x: torch.relu(x) * x, X)
    assert span.source.op == "placeholder"


def test_an_end_to_looking_back():
    def forward(self, x):
        for _ in range(300):
            x = x * 0.99
        return x

    _, span = span_at_the_end(forward, X)
    assert 2 < len(span.nodes) <= 64


CHANNELS = {
    "PReLU": (lambda s, x: s.p(x), IMAGE, {"p": nn.PReLU(3, 0.3)}, 1),
    "prelu": (lambda s, x: F.prelu(x, s.w), IMAGE, {"w": nn.Parameter(torch.rand(3))}, 1),
    "PReLU of one": (lambda s, x: s.p(x), IMAGE, {"p": nn.PReLU()}, None),
    "a factor": (lambda s, x: x * s.w + 1, X, {"w": CONSTANT}, 1),
    "a factor by channel": (lambda s, x: x * s.w, IMAGE, {"w": nn.Parameter(torch.randn(1, 3, 1, 1))}, 1),
    "a row of pixels": (lambda s, x: x * s.w, IMAGE, {"w": nn.Parameter(torch.randn(6, 1))}, 2),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_a_table_for_each_channel(name):
    function, x, members, dim = CHANNELS[name]
    members["p"] = members.get("p", nn.Identity())
    if isinstance(members["p"], nn.PReLU) and dim:
        members["p"].weight.data.uniform_()
    gm, span = span_at_the_end(function, x, **members)
    assert span.dim == dim
    q = quantize(x, 0.02, 120)
    table = span.table(gm, dequantize(torch.arange(256, dtype=torch.uint8), 0.02, 120))
    y = lookup(q, table) if dim is None else lookup_channels(q, table, dim)
    assert torch.equal(y, copy.deepcopy(gm).double()(dequantize(q, 0.02, 120).double()).float())


def test_prelu_by_channel_is_integer(model_of):
    model = model_of(
        lambda s, x: s.b(s.p(s.a(x)) + s.q(s.a(x))),
        a=nn.Conv2d(3, 5, 3),
        b=nn.Conv2d(5, 2, 3),
        p=nn.PReLU(5),
        q=nn.PReLU(5),
    )
    model.p.weight.data.uniform_()
    qmodel = fxq.quantize(model, IMAGE, check=True)
    assert floats(qmodel) == []
    assert len(targets(qmodel, lookup_channels)) == 2
    assert (fxq.golden(qmodel)(IMAGE.numpy()) == qmodel(IMAGE).numpy()).all()
    assert torch.equal(qmodel(IMAGE[:1]), qmodel(IMAGE)[:1])


def test_too_many_channels(model_of):
    x = torch.randn(4, MAX_CHANNELS + 1)
    linears = {name: nn.Linear(MAX_CHANNELS + 1, MAX_CHANNELS + 1) for name in ("l", "k")}
    model = model_of(lambda s, x: s.k(s.l(x) * s.c), c=nn.Parameter(torch.ones(MAX_CHANNELS + 1)), **linears)
    qmodel = fxq.quantize(model, x)
    assert floats(qmodel) == [("mul", fxq.Reason.UNPROFITABLE)]


class TestWholeModels:
    def test_behind_a_product_the_epilogue_is_preferred(self, model_of):
        for act, count in ((F.silu, 0), (F.hardswish, 0), (F.mish, 1), (lambda x: F.leaky_relu(x, 0.1), 1)):
            convs = {"a": nn.Conv2d(3, 5, 3), "b": nn.Conv2d(5, 2, 3)}
            qmodel = fxq.quantize(model_of(lambda s, x, act=act: s.b(act(s.a(x))), **convs), IMAGE, check=True)
            assert len(targets(qmodel, lookup)) == count
            assert floats(qmodel) == []

    def test_behind_a_large_convolution_a_table_is_faster_than_an_exponential(self, model_of):
        images = torch.randn(4, 3, 24, 24)
        for act, size, count in ((F.silu, 24, 1), (F.hardswish, 24, 0), (F.silu, 8, 0), (torch.sigmoid, 24, 1)):
            convs = {"a": nn.Conv2d(3, 5, 3), "b": nn.Conv2d(5, 2, 3)}
            model = model_of(lambda s, x, act=act: s.b(act(s.a(x))), **convs)
            x = images[:, :, :size, :size]
            recipe = fxq.Recipe(judge_costs=False)
            qmodel = fxq.quantize(model, x, recipe=recipe, check=True)
            assert len(targets(qmodel, lookup)) == count
            assert floats(qmodel) == []
            excluded = fxq.quantize(model, x, recipe=fxq.Recipe(ops={"lookup": fxq.FLOAT}, judge_costs=False))
            assert targets(excluded, lookup) == [] and floats(excluded) == []

    def test_behind_a_transposed_convolution_there_is_no_epilogue(self, model_of):
        layers = {"a": nn.ConvTranspose2d(3, 5, 3), "b": nn.Conv2d(5, 2, 3)}
        qmodel = fxq.quantize(model_of(lambda s, x: s.b(F.silu(s.a(x))), **layers), IMAGE, check=True)
        assert len(targets(qmodel, lookup)) == 1 and floats(qmodel) == []

    def test_integers_alone(self, model_of):
        """Under fixed point a table takes the place of an epilogue in float."""
        model = model_of(lambda s, x: s.k(F.gelu(s.l(x))), **copy.deepcopy(LAYERS))
        qmodel = fxq.quantize(model, X, recipe=fxq.Recipe(requant="fixed"), strict=True)
        assert qmodel.report.float_steps == [] and len(targets(qmodel, lookup)) == 1

    def test_a_gate_of_two_that_are_bounded(self, model_of):
        """WaveNet's: both tables, and their product, in integers; a gated linear unit has outliers and stays float."""
        for act, islands in ((torch.tanh, []), (F.silu, ["silu", "sigmoid", "mul"])):
            convs = {"a": nn.Conv1d(4, 8, 3), "b": nn.Conv1d(4, 4, 3)}

            def forward(self, x, act=act):
                left, right = self.a(x).chunk(2, 1)
                return self.b(act(left) * torch.sigmoid(right))

            recipe = fxq.Recipe(judge_costs=False)
            qmodel = fxq.quantize(model_of(forward, **convs), torch.randn(8, 4, 40), recipe=recipe, check=True)
            assert [op for op, _ in floats(qmodel) if op not in ("chunk", "getitem")] == islands

    def test_to_float_where_others_want_integers(self, model_of):
        model = model_of(lambda s, x: (lambda y: (s.k(y), torch.sigmoid(y * 2)))(s.l(x) + x), **copy.deepcopy(LAYERS))
        qmodel = fxq.quantize(model, X, check=True)
        (node,) = targets(qmodel, lookup)
        assert node.meta["value"].dtype == torch.float32
        (decision,) = [d for d in qmodel.report.decisions if d.op == "sigmoid"]
        assert (decision.form, decision.detail) == ("int8", "its result is float32")
        assert (fxq.golden(qmodel)(X.numpy())[1] == qmodel(X)[1].numpy()).all()

    def test_what_only_floats_read_stays_float(self, model_of):
        for forward in (lambda s, x: torch.sin(s.l(x) + x), lambda s, x: s.l(torch.sin(x))):
            qmodel = fxq.quantize(model_of(forward, **copy.deepcopy(LAYERS)), X)
            assert targets(qmodel, lookup) == []
            assert dict(floats(qmodel))["sin"] in (fxq.Reason.FLOAT_READER, fxq.Reason.FLOAT_OPERANDS)

    def test_a_state_is_no_constant(self, model_of):
        def forward(self, x):
            self.state.add_(1)
            return self.k((self.l(x) + x) * self.state)

        qmodel = fxq.quantize(model_of(forward, state=torch.ones(1), **copy.deepcopy(LAYERS)), X)
        assert targets(qmodel, lookup, lookup_channels) == []
        first, second = qmodel(X), qmodel(X)
        assert not torch.equal(first, second)

    def test_excluded(self, model_of):
        model = model_of(lambda s, x: s.k(F.mish(s.l(x))), **copy.deepcopy(LAYERS))
        qmodel = fxq.quantize(model, X, recipe=fxq.Recipe(ops={"lookup": fxq.FLOAT}))
        assert floats(qmodel) == [("mish", fxq.Reason.USER_EXCLUDED)]

    def test_everything_that_models_are_for(self, model_of, tmp_path):
        model = model_of(lambda s, x: s.k(F.elu(F.mish(s.l(x)) + x) * s.c), c=CONSTANT, **copy.deepcopy(LAYERS))
        qmodel = fxq.quantize(model, X, check=True, dump=tmp_path / "dump")
        assert len(targets(qmodel, lookup)) == 1 and len(targets(qmodel, lookup_channels)) == 1
        y = qmodel(X)
        fxq.save(qmodel, tmp_path / "model.fxq")
        assert torch.equal(fxq.load(tmp_path / "model.fxq")(X), y)
        assert torch.equal(copy.deepcopy(qmodel)(X), y)
        assert qmodel.state_dict().keys() >= {node.args[1].target for node in targets(qmodel, lookup)}
        assert [qmodel(X[:n]).shape for n in (0, 1, 5)] == [(0, 8), (1, 8), (5, 8)]
        assert torch.equal(qmodel(X[:5]), y[:5])
        assert torch.equal(torch.compile(qmodel, backend="aot_eager", fullgraph=True)(X), y)
        comparison = fxq.compare(model, qmodel, X)
        assert {layer.op for layer in comparison.layers} >= {"fxq.lookup", "fxq.lookup_channels"}
        assert min(layer.alone for layer in comparison.layers) > 25
        assert "lookup" in fxq.draw(qmodel, tmp_path / "model.dot").read_text()
        golden = fxq.golden(qmodel)
        assert (golden(X.numpy()) == y.numpy()).all()
        golden.dump(tmp_path / "golden", X.numpy())

    def test_trained_slopes(self, model_of):
        """QAT trains what becomes a table."""
        model = model_of(lambda s, x: s.k(s.p(s.l(x)) + x), p=nn.PReLU(8), **copy.deepcopy(LAYERS)).train()
        prepared = fxq.prepare_qat(model, X)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (prepared(X) ** 2).mean().backward()
            optimizer.step()
        assert not torch.equal(prepared.get_parameter("p.weight"), torch.full((8,), 0.25))
        qmodel = fxq.convert(prepared)
        assert len(targets(qmodel, lookup_channels)) == 1
        with torch.no_grad():
            assert fxq.comparison.sqnr(prepared.eval()(X), qmodel(X)) > 25


def test_threads(model_of):
    q = torch.randint(0, 256, (3, 1 << 17), dtype=torch.uint8)
    table = torch.randn(256)
    before = torch.get_num_threads()
    results = []
    for threads, op in itertools.product((1, 2), (lookup, lambda q, t: lookup_channels(q, t.expand(3, 256), 0))):
        torch.set_num_threads(threads)
        results.append(op(q, table))
    torch.set_num_threads(before)
    assert all(torch.equal(result, table[q.long()]) for result in results)
