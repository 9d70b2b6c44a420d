"""fxq.direct: calls written shorter, in the memory of operands that nobody else reads; never another number."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.direct import shorten
from fxq.errors import InputError
from fxq.graph import Value

X = torch.randn(4, 6)
Y = torch.randn(4, 6)


def lines(qmodel):
    """name: expression of what runs."""
    source, _ = shorten("\n".join(type(qmodel).source_lines), qmodel.graph)
    found = (line.split(";")[0].strip().partition(" = ") for line in source.splitlines())
    return {name: expression for name, _, expression in found if expression}


def of(model, *inputs, **options):
    """A float model as fxq runs it, its outputs and inputs held to the model's."""
    qmodel = fxq.quantize(model, inputs, recipe=fxq.Recipe("float"), progress=False, **options)
    given = [x.clone() for x in inputs]
    with torch.no_grad():
        expected = model(*(x.clone() for x in inputs))
        for _ in range(2):  # what was computed in place once is computed again
            assert torch.equal(qmodel(*given), expected)
    assert all(map(torch.equal, given, inputs))
    return qmodel


FITS = {
    "unary": (lambda x, y: torch.sigmoid(x + y), "add_1.sigmoid_()"),
    "of a method": (lambda x, y: (x + y).exp(), "add_1.exp_()"),
    "a number": (lambda x, y: (x + y) * 2.5, "add_1.mul_(2.5)"),
    "operators": (lambda x, y: ((x + y) - 1) / 3, "sub.div_(3)"),
    "clamp": (lambda x, y: (x + y).clamp(-1, 0.5), "add_1.clamp_(-1, 0.5)"),
    "what it is made of": (lambda x, y: (x + y) * y, "add_1.mul_(y)"),
    "from further up": (lambda x, y: torch.tanh(x * y) - x, "tanh.sub_(x)"),
    "with itself": (lambda x, y: (t := x + y) * t, "add_1.mul_(add_1)"),
    "the model's own": (lambda x, y: torch.sub(x, y).mul_(x), "sub.mul_(x)"),
    "of a product": (lambda x, y: F.linear(x, y).relu(), "linear_1.relu_()"),
}


@pytest.mark.parametrize("name", FITS)
def test_in_memory_that_nobody_else_reads(name, model_of):
    forward, expected = FITS[name]
    qmodel = of(model_of(lambda self, x, y: forward(x, y)), X, Y)
    assert expected in lines(qmodel).values()
    assert "_(" not in qmodel.code


STAYS = {
    "an input": (lambda x, y: torch.relu(x), "relu_"),
    "a view of an input": (lambda x, y: torch.relu(x.flatten()), "relu_"),
    "an input that a move leaves as it is": (lambda x, y: torch.relu(x.reshape(4, 6)), "relu_"),
    "read later": (lambda x, y: (t := x + y).sigmoid() - t, "sigmoid_"),
    "returned as well": (lambda x, y: torch.stack([(t := x + y), t.sigmoid()]), "sigmoid_"),
    "a view is read later": (lambda x, y: (t := x + y)[:2].sum() + t.sigmoid(), "sigmoid_"),
    "an operand that it is not made of": (lambda x, y: torch.relu(x + 1) - y, "sub_"),
    "a float from integers": (lambda x, y: (x.int() + 1) / 2, "div_"),
    "a keyword": (lambda x, y: torch.add(x + y, y, alpha=2), "add_"),
    "no number but a tensor": (lambda x, y: (x + 1) * y.sum(), "mul_"),
}


@pytest.mark.parametrize("name", STAYS)
def test_memory_that_others_read_stays(name, model_of):
    forward, wrong = STAYS[name]
    qmodel = of(model_of(lambda self, x, y: forward(x, y)), X, Y)
    assert not any(f".{wrong}(" in expression for expression in lines(qmodel).values())


def test_constants_stay(model_of):
    model = model_of(lambda self, x: x * self.scale * self.scale, scale=nn.Parameter(torch.tensor(1.5)))
    assert any(expression.endswith(".mul_(scale)") for expression in lines(of(model, X)).values())
    graph = torch.fx.Graph()
    weight = graph.get_attr("weight")
    result = graph.call_function(torch.relu, (weight,))
    graph.output(result)
    for node in (weight, result):
        node.meta["value"] = Value(torch.float32, (4, 6))
    assert "relu = weight.relu();" in shorten(graph.python_code("self").src, graph)[0]


def test_memory_that_a_result_is_written_to_stays():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.call_function(torch.add, (x, x), {"out": y})
    result = graph.call_function(torch.relu, (total,))
    graph.output((result, y))
    for node in graph.nodes:
        node.meta["value"] = Value(torch.float32, (4, 6))
    assert "relu_(" not in shorten(graph.python_code("self").src, graph)[0]


def test_the_sizes_of_another_call(model_of):
    """On the examples both are as large; a sum would not fit into its first operand where the second has more rows."""
    qmodel = of(model_of(lambda self, x, y: (x * 2 + y) * 3 + y), X[:1], Y[:1])
    assert torch.equal(qmodel(X[:1], Y), (X[:1] * 2 + Y) * 3 + Y)
    assert torch.equal(qmodel(X, Y[:1]), (X * 2 + Y[:1]) * 3 + Y[:1])


def test_a_number_where_the_examples_had_a_tensor(model_of):
    assert torch.equal(of(model_of(lambda self, x: torch.relu(x + 1)), X)(2.5), torch.tensor(3.5))
    assert torch.equal(of(model_of(lambda self, x: (x - 1) * 2), X)(2.5), torch.tensor(3.0))


def test_another_type_of_input(model_of):
    qmodel = of(model_of(lambda self, x: (x + 1) / 2), X)
    with pytest.raises(InputError, match=r"has dtype torch\.int64; this model was quantized"):
        qmodel(torch.arange(3))
    assert torch.equal(qmodel(X.double()), (X.double() + 1) / 2)


def test_gradients_are_refused_still(model_of):
    qmodel = of(model_of(lambda self, x: (x + 1).exp() * 2), X)
    y = qmodel(X.clone().requires_grad_())
    with pytest.raises(InputError, match="has no gradients"):
        y.sum().backward()


def test_under_vmap(model_of):
    qmodel = of(model_of(lambda self, x, y: torch.relu(x + y) * 2 + y), X, Y)
    assert torch.equal(torch.vmap(qmodel, in_dims=(None, 0))(X[0], Y), torch.relu(X[0] + Y) * 2 + Y)


def test_out_of_a_file_and_a_pickle(model_of, tmp_path):
    qmodel = of(model_of(lambda self, x, y: torch.relu(x + y) * 2), X, Y)
    fxq.save(qmodel, tmp_path / "model.fxq")
    for again in (fxq.load(tmp_path / "model.fxq"), pickle.loads(pickle.dumps(qmodel))):
        assert lines(again) == lines(qmodel)


def test_a_failure_names_the_operation(model_of):
    qmodel = of(model_of(lambda self, x, y: torch.relu(x + 1) @ y), X, Y.t().contiguous())
    with pytest.raises(InputError, match=r"test_direct.py:\d+ \(%matmul\): input 'y' has dtype torch.int32"):
        qmodel(X, torch.ones(6, 4, dtype=torch.int32))
