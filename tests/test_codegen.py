"""fxq.codegen: calls written shorter, in the memory of operands that nobody else reads; never another number."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxq
from fxq.codegen import Source
from fxq.errors import InputError
from fxq.graph import Value

X = torch.randn(4, 6)
Y = torch.randn(4, 6)


def lines(gm):
    """name: expression of what runs."""
    source = Source(gm, direct=True)
    pairs = zip(source.names, source.lines, strict=True)
    return {name: line.split(";")[0].partition(" = ")[2] for name, line in pairs if " = " in line}


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
    root = nn.Module()
    root.weight = nn.Parameter(X)
    assert lines(torch.fx.GraphModule(root, graph))["relu"] == "weight.relu()"


def test_memory_that_a_result_is_written_to_stays():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.call_function(torch.add, (x, x), {"out": y})
    result = graph.call_function(torch.relu, (total,))
    graph.output((result, y))
    for node in graph.nodes:
        node.meta["value"] = Value(torch.float32, (4, 6))
    assert "relu_(" not in lines(torch.fx.GraphModule(nn.Module(), graph))["relu"]


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


def test_the_dtype_of_another_call(model_of):
    """A constant without dimensions widens what has none either."""
    qmodel = of(model_of(lambda self, x: (x + 1) * self.scale - self.scale, scale=nn.Parameter(torch.tensor(1.5))), X)
    one = torch.tensor(1.0, dtype=torch.float16)
    assert qmodel(one).dtype == torch.float32
    assert lines(qmodel)["sub"] == "mul_1.sub_(scale)"


def test_a_whole_number_where_the_examples_had_a_tensor(model_of):
    qmodel = of(model_of(lambda self, x, y: torch.exp(torch.add(y, 1)) + x), X, Y[0, 0])
    with pytest.raises(InputError, match=r"\(%exp\): input 'y' has dtype torch\.int64"):
        qmodel(X, 3)


def test_names_of_the_users_that_look_like_ours():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self._fxq_1 = nn.Linear(6, 6)
            self._fxq_at_0 = nn.Parameter(torch.ones(6))

        def forward(self, _fxq_0, _fxq_at_1, _fxq_):
            return torch.softmax(self._fxq_1(_fxq_0), -1) + _fxq_0.cumsum(0) * _fxq_at_1 + _fxq_ * self._fxq_at_0

    of(Named().eval(), X, Y, X)


def test_a_parameter_whose_node_has_the_name_of_another():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("input"), graph.placeholder("input_1")  # `input` is Python's, and its node `input_1`
    graph.output((x, y))
    forward = Source(torch.fx.GraphModule(nn.Module(), graph), direct=True).compile("here")
    assert forward(None, 1, 2) == (1, 2)


def test_arguments_are_what_they_are(model_of):
    texts = "    x = y", "a;  x = None", "\n    sub = x", "'\"\\"

    def forward(self, x, y):
        return {text: [(x - y).clamp(-float("inf"), 0.5)[..., None, ::2], (x,), None] for text in texts}

    qmodel = fxq.quantize(model_of(forward), (X, Y), recipe=fxq.Recipe("float"), progress=False)
    assert list(qmodel(X, Y)) == list(texts)
    for value, (same,), nothing in qmodel(X, Y).values():
        assert torch.equal(value, (X - Y).clamp(max=0.5)[:, None, ::2]) and same is X and nothing is None


def test_constants_that_python_text_does_not_give_back():
    graph = torch.fx.Graph()
    kinds = float("nan"), 1 - 2j, torch.float16, torch.device("cpu"), ..., torch.Size([2]), X.numpy().dtype
    graph.placeholder("x", default_value=torch.float32)
    graph.output([*kinds, slice(None, -1), {"a": (1,)}, ()])
    forward = Source(torch.fx.GraphModule(nn.Module(), graph), direct=True).compile("here")
    *same, part, table, empty = forward(None)
    assert all(x is y for x, y in zip(same, kinds, strict=True) if not isinstance(y, torch.Size))
    assert (part, table, empty) == (slice(None, -1), {"a": (1,)}, ())


@pytest.mark.parametrize(
    "place", [lambda x: [x], lambda x: {"x": (x,)}, lambda x: [None, 2, x]], ids=["list", "dict", "last"]
)
def test_gradients_of_what_a_container_holds(place, model_of):
    """Past the integers there is a way to the input, whose gradient alone would be wrong."""
    linear = nn.Linear(6, 6)
    model = model_of(lambda self, held: linear(pytree.tree_leaves(held)[-1]) + pytree.tree_leaves(held)[-1].cumsum(0))
    qmodel = fxq.quantize(model, (place(X),), progress=False)
    assert torch.equal(qmodel(place(X.clone().requires_grad_())), qmodel(place(X)))
    with pytest.raises(InputError, match="input 'held' of an integer model has no gradients"):
        qmodel(place(X.clone().requires_grad_())).sum().backward()


def test_gradients_behind_a_hook(model_of):
    qmodel = fxq.quantize(model_of(lambda self, x: self.l(x) + x.cumsum(0), l=nn.Linear(6, 6)), X, progress=False)
    qmodel.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(InputError, match="has no gradients"):
        qmodel(X.clone().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_gradients(model_of):
    qmodel = fxq.quantize(model_of(lambda self, x: self.l(x) + x.cumsum(0), l=nn.Linear(6, 6)), X, progress=False)
    swapped = fxq.swap_linears(nn.Sequential(nn.Linear(6, 6)), "w8a8-dynamic")[0]
    for one in (qmodel, swapped[0]):
        with pytest.raises(InputError, match="has no gradients"):
            torch.func.jvp(one, (X,), (Y,))
    assert torch.equal(torch.func.jvp(lambda y: qmodel(X) + y, (X,), (Y,))[1], Y)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_gradients_as_functions(model_of):
    qmodel = fxq.quantize(model_of(lambda self, x: self.l(x) + x.cumsum(0), l=nn.Linear(6, 6)), X, progress=False)
    with pytest.raises(InputError, match="input 'x' of an integer model has no gradients"):
        torch.func.grad(lambda x: qmodel(x).sum())(X)
    assert torch.equal(torch.func.grad(lambda y: (qmodel(X) * y).sum())(Y), qmodel(X))


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
    with pytest.raises(InputError, match=r"test_codegen.py:\d+ \(%matmul\): input 'y' has dtype torch.int32"):
        qmodel(X, torch.ones(6, 4, dtype=torch.int32))
