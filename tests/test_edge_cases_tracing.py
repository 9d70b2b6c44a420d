"""What people's models hold, by the numbers of docs/tracing.md: what tracing alone makes of it."""

import collections
import copy
import hashlib
import io
import math
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.errors import GuardError, TraceError
from fxq.tracing import TracingWarning, guards, trace
from fxq.tracing.verify import is_same


def fingerprint(model):
    digest = hashlib.sha256(repr([(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain(value):
    return copy.deepcopy(value)


def same(gm, model, *args, **kwargs):
    """The graph and the model agree on these inputs, on outputs and on what they do to their inputs."""
    a_args, a_kwargs = plain((args, kwargs))
    e_args, e_kwargs = plain((args, kwargs))
    with torch.no_grad():
        actual, expected = gm(*a_args, **a_kwargs), model(*e_args, **e_kwargs)
    return is_same(actual, expected) and is_same((a_args, a_kwargs), (e_args, e_kwargs))


def check(model, *args, others=(), leaves=(), pickles=True, **kwargs):
    """Trace, compare on the examples and on other positional inputs, and again after deepcopy and pickle."""
    model.eval()
    before = fingerprint(model)
    inputs = plain((args, kwargs))
    gm = trace(model, args, kwargs, leaves=leaves)
    assert fingerprint(model) == before
    assert is_same((args, kwargs), inputs)
    assert all("origin" in node.meta for node in gm.graph.nodes)
    gm.graph.lint()
    smaller = copy.deepcopy(gm)
    smaller.graph.eliminate_dead_code()
    smaller.recompile()
    for version in (gm, smaller, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)) if pickles else gm):
        assert same(version, model, *args, **kwargs)
        for other in others:
            assert same(version, model, *other)
    return gm


def model_of(forward, **members):
    """A module with the given members and forward."""
    module = type("Model", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
            module.register_buffer(name, member)
        else:
            setattr(module, name, member)
    return module


def targets(gm):
    return [node.target for node in gm.graph.nodes]


def linear(n=8, m=8):
    return nn.Linear(n, m)


X, X5, SEQ = torch.randn(3, 8), torch.randn(5, 8), torch.randn(3, 4, 8)


def test_case_01_sequential_and_a_bare_linear():
    gm = check(nn.Sequential(linear(), nn.ReLU(), linear(8, 2)), X, others=[(X5,)])
    assert [node.op for node in gm.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert F.linear in targets(check(linear(), X, others=[(X5,)]))


def test_case_02_view_by_batch_size():
    gm = check(
        model_of(lambda self, x: self.l(x.view(x.size(0), -1)), l=linear(32)), SEQ, others=[(torch.randn(7, 4, 8),)]
    )
    assert len(guards(gm)) == 1


def test_case_03_unpacked_shape():
    def forward(self, x):
        b, t, c = x.shape
        return self.l(x.reshape(b * t, c)).view(b, t, -1)

    check(model_of(forward, l=linear()), SEQ, others=[(torch.randn(7, 9, 8),), (torch.randn(1, 1, 8),)])


def test_case_04_branch_on_batch_size():
    model = model_of(lambda self, x: self.l(x) if x.shape[0] > 2 else x, l=linear())
    gm = check(model, X, others=[(X5,)])
    with pytest.raises(
        GuardError, match=r"test_edge_cases_tracing.py:\d+ decided that `x.shape\[0\] > 2` is True .* False"
    ):
        gm(X[:2])


def test_case_05_assertions_on_shape():
    def forward(self, x):
        assert x.shape[1] == 8
        assert x.dim() == 2
        return self.l(x)

    gm = check(model_of(forward, l=linear()), X, others=[(X5,)])
    with pytest.raises(GuardError, match="rank"):
        gm(SEQ)
    with pytest.raises(GuardError, match=r"x.shape\[1\] == 8"):
        gm(torch.randn(3, 9))


def test_case_06_optional_mask_omitted():
    def forward(self, x, mask=None):
        return self.l(x) if mask is None else self.l(x) * mask

    gm = check(model_of(forward, l=linear()), X, others=[(X5,)])
    assert torch.equal(gm(x=X, mask=None), gm(X))
    with pytest.raises(GuardError, match=r"argument `mask` at None; this call has a tensor float32\[3, 8\]"):
        gm(X, X)


def test_case_07_optional_mask_given():
    def forward(self, x, mask=None):
        return self.l(x) if mask is None else self.l(x) * mask

    model = model_of(forward, l=linear())
    gm = check(model, X, X > 0, others=[(X5, X5 > 0)])
    assert same(gm, model, x=X, mask=X < 0)
    gm = check(model, X, mask=X > 0)
    with pytest.raises(Exception, match="NoneType"):
        gm(X)


def test_case_08_training_flag():
    model = model_of(lambda self, x: F.dropout(self.l(x), 0.5, self.training) + (1 if self.training else 2), l=linear())
    check(model, X)
    model.train()
    with pytest.warns(TracingWarning, match="training mode"):
        gm = trace(model, (X,), {})
    assert model.training
    assert not gm.training
    assert torch.equal(gm(X), model.eval()(X))


def test_case_09_dropout_modules():
    check(nn.Sequential(linear(), nn.Dropout(0.5), nn.ReLU(), nn.Dropout1d()), X, others=[(X5,)])


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(inplace=True),
        F.relu_,
        torch.Tensor.relu_,
        torch.Tensor.relu,
        torch.relu,
        F.relu,
        lambda x: x.clamp(min=0),
    ],
)
def test_case_10_relu_spellings(relu):
    check(
        model_of(lambda self, x: relu(self.l(x)), l=linear())
        if not isinstance(relu, nn.Module)
        else nn.Sequential(linear(), relu),
        X,
    )


def test_case_11_shared_relu():
    def forward(self, x):
        return self.r(self.l(self.r(self.l(self.r(x)))))

    gm = check(model_of(forward, l=linear(), r=nn.ReLU()), X)
    assert targets(gm).count("r") == 3


def test_case_12_output_used_twice():
    def forward(self, x):
        y = self.l(x)
        return torch.relu(y) + y

    check(model_of(forward, l=linear()), X)


def test_case_13_in_place_relu_aliases():
    def forward(self, x):
        y = self.l(x)
        r = F.relu_(y)
        return y + r

    check(model_of(forward, l=linear()), X)

    def views(self, x):
        y = self.l(x)
        y.view(-1)[:5].mul_(3)
        y[1].zero_()
        self.r(y)
        return y

    gm = check(model_of(views, l=linear(), r=nn.ReLU(inplace=True)), X)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert same(gm, model_of(views, **dict(gm.named_children())), X)


def test_case_14_linear_in_a_loop():
    def forward(self, x):
        for _ in range(3):
            x = torch.relu(self.l(x))
        return x

    assert targets(check(model_of(forward, l=linear()), X)).count("l") == 3


def test_case_15_one_module_under_two_names():
    shared = linear()
    gm = check(model_of(lambda self, x: self.b(self.a(x)), a=shared, b=shared), X)
    assert targets(gm).count("a") == 2


def test_case_16_tied_weight():
    a, b = linear(), linear()
    b.weight = a.weight
    gm = check(model_of(lambda self, x: self.b(self.a(x)), a=a, b=b), X)
    assert gm.a.weight is gm.b.weight
    again = pickle.loads(pickle.dumps(gm))
    assert again.a.weight is again.b.weight


def test_case_17_embedding_tied_to_head():
    model = model_of(lambda self, i: F.linear(self.e(i), self.e.weight), e=nn.Embedding(10, 8))
    gm = check(model, torch.tensor([[1, 2], [3, 4]]), others=[(torch.tensor([[5]]),)])
    assert "e.weight" in targets(gm)
    assert list(gm.state_dict()) == ["e.weight"]


def test_case_18_functional_linear():
    gm = check(
        model_of(
            lambda self, x: F.linear(x, self.w, self.b),
            w=nn.Parameter(torch.randn(4, 8)),
            b=nn.Parameter(torch.randn(4)),
        ),
        X,
    )
    assert "w" in targets(gm)
    assert isinstance(gm.w, nn.Parameter)


def test_case_19_keywords_only():
    check(
        model_of(lambda self, x: F.linear(input=x, weight=self.l.weight, bias=self.l.bias), l=linear()),
        X,
        others=[(X5,)],
    )


def test_case_20_matmul_with_transposed_weight():
    check(model_of(lambda self, x: x @ self.l.weight.t(), l=linear()), X, others=[(X5,)])


def test_case_21_addmm():
    check(model_of(lambda self, x: torch.addmm(self.l.bias, x, self.l.weight), l=linear()), X, others=[(X5,)])


def test_case_22_einsum():
    check(model_of(lambda self, x: torch.einsum("bi,oi->bo", x, self.l.weight), l=linear()), X, others=[(X5,)])


def test_case_23_residual():
    check(model_of(lambda self, x: torch.relu(self.l(x) + x), l=linear()), X, others=[(X5,)])


def test_case_24_scalar_arithmetic():
    def forward(self, x):
        y = self.l(x)
        y += 1
        z = 1 + y * 2.0 - (3 - y) / 2 + 2 / (y + 10) + 2**y
        z -= y
        z /= 3
        return -(z**2) + (y // 1) % 3

    check(model_of(forward, l=linear()), X, others=[(X5,)])


def test_case_25_slice_assignment():
    def forward(self, x):
        y = self.l(x)
        y[:, 0] = 0
        y[x > 0] = x[x > 0]
        y[1:, 2:4] += 1
        return y

    gm = check(model_of(forward, l=linear()), X, others=[(X5,)])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert (gm(X)[:, 0].clamp(max=0) == 0).all()


def test_case_26_cat():
    check(model_of(lambda self, x: torch.cat([self.l(x), self.k(x)], 1), l=linear(), k=linear()), X, others=[(X5,)])


def test_case_27_factories_with_proxied_sizes():
    def forward(self, x):
        b = x.shape[0]
        zeros = (
            torch.zeros(b, 8) + torch.ones((b, 8)) + torch.full((b, 1), 0.5) + x.new_zeros(b, 8) + x.new_full((b, 8), 2)
        )
        return (
            x + zeros + torch.eye(b, 8) + torch.empty(b, 8).zero_() + torch.zeros(size=(b, 8)) + torch.zeros(*x.shape)
        )

    gm = check(model_of(forward), X, others=[(X5,), (X[:1],)])
    assert len(guards(gm)) == 1


def test_case_28_arange_and_constants():
    constant = torch.randn(8)

    def forward(self, x):
        positions = torch.arange(x.shape[0]).unsqueeze(1) + torch.arange(0, x.shape[1], 1)
        return x + positions + torch.zeros_like(x) + torch.tensor(2.0) + constant + torch.tensor([1.0] * 8)

    gm = check(model_of(forward), X, others=[(X5,)])
    assert [name for name, _ in gm.named_buffers()] == ["_tensor_constant0"]


def test_case_29_to_device_of_weight():
    check(model_of(lambda self, x: self.l(x.to(self.l.weight.device).to(x.device)), l=linear()), X, others=[(X5,)])


def test_case_30_dtype_changes():
    def forward(self, x):
        return self.l(x.to(torch.float64).float()).type_as(x).to(x.dtype) + x.half().float()

    check(model_of(forward, l=linear()), X, others=[(X5,)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_case_31_other_float_types(dtype):
    check(nn.Sequential(linear(), nn.ReLU()).to(dtype), X.to(dtype), others=[(X5.to(dtype),)])


def test_case_32_len():
    gm = check(model_of(lambda self, x: self.l(x) * len(x), l=linear()), X)
    with pytest.raises(GuardError, match=r"`x.shape\[0\]` is 3"):
        gm(X5)


def test_case_33_int_of_a_size():
    gm = check(model_of(lambda self, x: x[:, : int(x.shape[1] * 0.5)] + 0), X, others=[(X5,)])
    assert same(gm, model_of(lambda self, x: x[:, :4]), torch.randn(2, 9))
    with pytest.raises(GuardError, match=r"int\(x.shape\[1\] \* 0.5\)"):
        gm(torch.randn(3, 10))


def test_case_34_range_over_a_size():
    gm = check(model_of(lambda self, x: torch.stack([x[i] * i for i in range(x.shape[0])])), X)
    with pytest.raises(GuardError, match=r"`x.shape\[0\]` is 3"):
        gm(X5)


def test_case_35_iterate_over_chunks():
    gm = check(model_of(lambda self, x: sum(t * t for t in x.chunk(2, 1))), X, others=[(X5,)])
    assert guards(gm) == [guards(gm)[0]]
    gm = check(model_of(lambda self, x: sum(t * t for t in x)), X)
    with pytest.raises(GuardError, match=r"`len\(unbind\)` is 3"):
        gm(X5)


def test_case_36_unpack_chunks():
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return a * b

    check(model_of(forward), X, others=[(X5,)])


def test_case_37_starred_shape():
    def forward(self, x):
        b, *rest = x.shape
        return x.reshape(b, math.prod(rest)).reshape(b, *rest) + x.view(*x.shape[:-1], 2, -1).flatten(-2)

    check(model_of(forward), SEQ, others=[(torch.randn(5, 7, 8),)])


def test_case_38_containers_of_modules():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.by_name["a"](x) + self.layers[self.i](x) + getattr(self, "l")(x)  # noqa: B009

    model = model_of(
        forward, layers=nn.ModuleList([linear(), linear()]), by_name=nn.ModuleDict({"a": linear()}), l=linear(), i=1
    )
    gm = check(model, X, others=[(X5,)])
    assert [target for target in targets(gm) if isinstance(target, str) and "l" in target][:2] == [
        "layers.0",
        "layers.1",
    ]


def test_case_39_sequential_slice():
    model = model_of(lambda self, x: self.q[:2](x) + self.q[2](x), q=nn.Sequential(linear(), nn.ReLU(), linear()))
    assert "q.0" in targets(check(model, X, others=[(X5,)]))


def test_case_40_parameter_list_and_nested_paths():
    model = model_of(
        lambda self, x: self.s(x) @ self.p[0],
        p=nn.ParameterList([torch.randn(8, 8)]),
        s=nn.Sequential(nn.Sequential(linear())),
    )
    gm = check(model, X, others=[(X5,)])
    assert {"p.0", "s.0.0"} <= set(targets(gm))
    assert next(node for node in gm.graph.nodes if node.target == "s.0.0").meta["origin"].module == "s.0.0"


def test_case_41_star_args():
    check(model_of(lambda self, *args: args[0] + args[1]), X, X, others=[(X5, X5)])

    def forward(self, x, y, *rest):
        return self.inner(*(x, y), *rest)

    gm = check(model_of(forward, inner=model_of(lambda self, *a: sum(a))), X, X, X, others=[(X5, X5, X5)])
    with pytest.raises(TypeError):
        gm(X, X)


def test_case_42_keyword_arguments():
    def forward(self, x, **kw):
        return x + sum(kw.values())

    gm = check(model_of(forward), X)
    assert str(next(iter(gm.graph.nodes)).target) == "x"
    model = model_of(forward)
    gm = check(model, X, a=X, b=X)
    assert same(gm, model, X5, a=X5, b=X5)


def test_case_43_containers_as_inputs():
    gm = check(
        model_of(lambda self, d: d["a"] + d["b"][0]), {"a": X, "b": (X, None)}, others=[({"a": X5, "b": (X5, None)},)]
    )
    check(model_of(lambda self, xs: xs[0] + xs[1]), [X, X], others=[([X5, X5],)])
    gm = check(model_of(lambda self, xs: sum(x * x for x in xs)), [X, X], others=[([X5, X5],)])
    with pytest.raises(GuardError, match=r"argument `xs` was \[\*, \*\].*this call has '\[\*, \*, \*\]'"):
        gm([X, X, X])


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Output:
    hidden: torch.Tensor
    state: torch.Tensor | None = None


class ModelOutput(collections.OrderedDict):
    pass


def test_case_44_structured_outputs():
    check(model_of(lambda self, x: {"a": self.l(x), "b": [x, None, 3]}, l=linear()), X, others=[(X5,)])
    check(model_of(lambda self, x: (x, None, (x, x.shape[0]))), X, others=[(X5,)])
    check(model_of(lambda self, x: Pair(x + 1, None)), X, others=[(X5,)])
    check(model_of(lambda self, x: x.max(dim=1)), X, others=[(X5,)])
    check(model_of(lambda self, p: p.first * 2), Pair(X, None))


def test_case_45_dataclass_output():
    check(model_of(lambda self, x: Output(hidden=self.l(x)), l=linear()), X, others=[(X5,)])
    check(model_of(lambda self, o: o.hidden * 2), Output(X), others=[(Output(X5),)])
    check(model_of(lambda self, x: ModelOutput(a=x * 2)), X, others=[(X5,)])


def test_case_46_float_argument():
    gm = check(model_of(lambda self, x, alpha: self.l(x) * alpha + alpha**2, l=linear()), X, 0.5, others=[(X5, 0.25)])
    assert guards(gm) == []


def test_case_47_bool_argument():
    gm = check(model_of(lambda self, x, flag: self.l(x) if flag else x, l=linear()), X, True, others=[(X5, True)])
    with pytest.raises(GuardError, match="argument `flag` was True"):
        gm(X, False)
    gm = check(model_of(lambda self, x, mode="a": x if mode == "a" else -x), X, "b")
    with pytest.raises(GuardError, match="argument `mode` was 'b'"):
        gm(X, "a")


def test_case_48_int_argument_as_dim():
    gm = check(model_of(lambda self, x, dim: x.softmax(dim) + x.sum(dim, keepdim=True)), X, 0, others=[(X, 1)])
    assert guards(gm) == []
    gm = check(model_of(lambda self, x, n: sum([x] * n) + x[:n].sum()), X, 2, others=[(X5, 2)])
    with pytest.raises(GuardError, match="`n` is 2"):
        gm(X, 3)


def test_case_49_ids_into_an_embedding():
    ids = torch.randint(0, 10, (2, 5))
    check(nn.Sequential(nn.Embedding(10, 8), linear()), ids, others=[(ids.repeat(2, 2),)])


def test_case_50_item_as_a_scalar():
    check(model_of(lambda self, x: self.l(x) * x.max().item() + x[0, 0].item() / 2, l=linear()), X, others=[(X5,)])


def test_case_51_numpy_round_trip():
    model = model_of(lambda self, x: torch.from_numpy(np.tanh(x.numpy())))
    with pytest.raises(TraceError, match=r"test_edge_cases_tracing.py:\d+ .*numpy.*frontend="):
        trace(model.eval(), (X,), {})
    outer = nn.Sequential(linear(), model)
    check(outer, X, leaves=("1",), others=[(X5,)], pickles=False)
    check(outer, X, leaves=(type(model),), pickles=False)


def test_case_52_decisions_on_values():
    def loop(self, x):
        while x.abs().max() > 10:
            x = x / 2
        return x

    for model in (
        model_of(lambda self, x: x if x.sum() > 0 else -x),
        model_of(loop),
        model_of(lambda self, x: x[: int(x.argmax())]),
        model_of(lambda self, x: x if x.max().item() > 100 else x + 1),
        model_of(lambda self, x: x * float(x.sum())),
    ):
        with pytest.raises(TraceError, match=r"test_edge_cases_tracing.py:\d+ (needs the value|decides).*frontend="):
            trace(model.eval(), (X,), {})

    counted = trace(model_of(lambda self, x: x + len(x.tolist())).eval(), (X,), {})  # a size, not a value
    assert torch.equal(counted(X), X + len(X))
    with pytest.raises(GuardError, match="shape"):
        counted(X5)

    def swallowed(self, x):
        try:
            return x if x.sum() > 0 else -x
        except Exception:
            return x

    for x in (X, -X):  # torch.export would take what the model does with the exception for its answer
        with pytest.raises(TraceError, match="needs the value"):
            trace(model_of(swallowed).eval(), (x,), {})
    check(model_of(lambda self, x: x if self.w.sum() > 0 else -x, w=torch.ones(2)), X)


def test_case_53_isinstance_tensor():
    def forward(self, x, n):
        assert isinstance(x, torch.Tensor)
        assert isinstance(n, int)
        assert isinstance(x.shape[0], int)
        assert isinstance(x.shape[0] / 2, float)
        assert isinstance(x.shape, tuple)
        assert torch.is_tensor(x)
        assert isinstance(self.l.weight, nn.Parameter)
        return self.l(x)

    check(model_of(forward, l=linear()), X, 3, others=[(X5, 4)])


def helper(x, k):
    return x.flip(0) if x.sum() > 0 else x * k


torch.fx.wrap("helper")


def test_case_54_wrapped_helper():
    gm = check(model_of(lambda self, x: self.l(helper(x, 2)), l=linear()), X, others=[(X5,), (-X5,)])
    assert helper in targets(gm)
    assert not isinstance(helper, type(pytest))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_case_55_leaves_and_autograd_functions():
    class Custom(nn.Module):
        def forward(self, x, scale=1):
            return {"y": x * scale if x.sum() > 0 else x, "n": 3}

    gm = check(
        model_of(lambda self, x: self.c(self.l(x), scale=2)["y"], c=Custom(), l=linear()),
        X,
        leaves=(Custom,),
        pickles=False,
    )
    assert "c" in targets(gm)
    check(model_of(lambda self, x: Double.apply(self.l(x)), l=linear()), X, others=[(X5,)])


def test_case_56_hooks():
    model = nn.Sequential(linear(), nn.ReLU())
    model.register_forward_hook(lambda module, args, out: out * 3)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, out: out + args[0])
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    gm = check(model, X, others=[(X5,)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gm.modules())
    check(model, X, leaves=("1",))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_case_57_weight_norm():
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ):
        model = nn.Sequential(wrap(linear()), nn.ReLU())
        gm = check(model, X, others=[(X5,)])
        assert targets(gm)[1:3] == ["0", "1"]
        assert isinstance(gm.get_submodule("0").weight, nn.Parameter)


def test_case_58_subclass_of_linear():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    gm = check(nn.Sequential(Scaled(8, 8)), X, others=[(X5,)])
    assert "0" not in targets(gm)
    assert {"0.weight", F.linear} <= set(targets(gm))


def test_case_61_attention_shows_its_projections():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    gm = check(
        model_of(lambda self, x: self.a(x, x, x, need_weights=False)[0], a=attention),
        SEQ,
        others=[(torch.randn(5, 6, 8),)],
    )
    assert targets(gm).count(F.linear) >= 2
    check(model_of(lambda self, x: self.a(x, x, x), a=attention), SEQ, others=[(torch.randn(5, 4, 8),)])
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    gm = check(encoder, SEQ, others=[(torch.randn(5, 6, 8),)])
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(targets(gm))
    check(nn.TransformerEncoderLayer(8, 2, 16), SEQ, others=[(torch.randn(4, 5, 8),)])
    check(
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        SEQ,
        SEQ,
        others=[(torch.randn(5, 4, 8), torch.randn(5, 4, 8))],
    )


def test_case_62_manual_attention():
    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.l(x).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(torch.tril(torch.ones(t, t)) == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v + F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).contiguous().view(b, t, c)

    check(model_of(forward, l=linear(8, 24)), SEQ, others=[(torch.randn(5, 6, 8),)])


def test_case_63_recurrent():
    check(model_of(lambda self, x: self.r(x), r=nn.LSTM(8, 4, batch_first=True)), SEQ, others=[(torch.randn(5, 6, 8),)])
    check(model_of(lambda self, x: self.r(x)[1], r=nn.GRU(8, 4)), SEQ)

    def forward(self, x):
        h = torch.zeros(x.size(0), 8)
        for i in range(4):
            h = self.c(x[:, i], h)
        return h

    check(model_of(forward, c=nn.GRUCell(8, 8)), SEQ, others=[(torch.randn(5, 4, 8),)])


def test_case_67_layer_norm_over_shape():
    check(model_of(lambda self, x: F.layer_norm(x, x.shape[-1:])), SEQ, others=[(torch.randn(5, 6, 8),)])


def test_case_68_data_dependent_shapes():
    def forward(self, x):
        return x[x > 0], torch.where(x > 0, x, 0), x.topk(2), x.nonzero()

    check(model_of(forward), X, others=[(X5,)])


def test_case_76_trivial_graphs():
    check(model_of(lambda self, x, unused: x), X, X, others=[(X5, X5)])
    check(model_of(lambda self, x: (x, x), spare=linear()), X, others=[(X5,)])


def test_case_78_buffer_mutated_in_forward():
    def add(self, x):
        self.buf.add_(1)
        return x + self.buf

    def rebind(self, x):
        self.buf = self.buf + x.mean()
        return x + self.buf

    def late(self, x):
        y = x + self.buf
        self.buf += 1
        return y

    for forward in (add, rebind, late):
        model = model_of(forward, buf=torch.zeros(1)).eval()
        gm = trace(model, (X,), {})
        gm.graph.eliminate_dead_code()
        gm.recompile()
        again = pickle.loads(pickle.dumps(gm))
        for _ in range(3):
            expected = model(X)
            assert torch.equal(gm(X), expected)
            assert torch.equal(again(X), expected)
        assert torch.equal(gm.buf, model.buf)

    def read(self, x):
        self.buf.add_(1)
        return x if self.buf.item() > 5 else -x

    with pytest.raises(TraceError, match="reads the value of `buf`"):
        trace(model_of(read, buf=torch.zeros(1)).eval(), (X,), {})


def test_case_79_results_left_on_the_module():
    def forward(self, x):
        self.cache = self.l(x)
        return self.cache * 2

    model = model_of(forward, l=linear()).eval()
    with pytest.warns(TracingWarning, match="leaves a result of its forward in `cache`"):
        gm = trace(model, (X,), {})
    assert not hasattr(model, "cache")
    assert not hasattr(gm, "cache")


def test_case_80_prints(capsys):
    def forward(self, x):
        print(f"{x.shape[0]:3d} {x.shape} {x.mean():.1f}")
        return x * 2

    with pytest.warns(TracingWarning, match=r"test_edge_cases_tracing.py:\d+ prints while it is traced"):
        gm = check(model_of(forward), X)
    capsys.readouterr()
    gm(X)
    assert capsys.readouterr().out == ""


def test_case_81_contexts():
    def forward(self, x):
        try:
            x = self.l(x)
        except ValueError:
            x = x * 2
        with torch.no_grad():
            x = x + 1
        return x if torch.jit.is_scripting() else -x

    check(model_of(forward, l=linear()), X, others=[(X5,)])


def test_case_82_checkpoint():
    from torch.utils.checkpoint import checkpoint

    check(model_of(lambda self, x: checkpoint(self.l, x, use_reentrant=False), l=linear()), X, others=[(X5,)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_case_83_scripted_submodule():
    scripted = torch.jit.script(nn.Sequential(linear(), nn.ReLU()))
    gm = check(model_of(lambda self, x: self.s(x) * 2, s=scripted), X, others=[(X5,)], pickles=False)
    assert "s" in targets(gm)

    @torch.jit.script
    def function(x):
        return x * 2 + 1

    check(model_of(lambda self, x: function(self.l(x)), l=linear()), X, others=[(X5,)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_case_84_wrapped_models():
    inner = nn.Sequential(linear(), nn.ReLU()).eval()
    check(torch.fx.symbolic_trace(inner), X, others=[(X5,)])
    gm = trace(model_of(lambda self, x: self.l(x) if x.shape[0] > 2 else x, l=linear()).eval(), (X,), {})
    again = check(gm, X, others=[(X5,)])
    with pytest.raises(GuardError):
        again(X[:1])
    assert targets(trace(nn.DataParallel(inner), (X,), {})) == targets(trace(inner, (X,), {}))
    assert targets(trace(torch.compile(inner), (X,), {})) == targets(trace(inner, (X,), {}))


def test_case_88_save_and_load():
    gm = trace(model_of(lambda self, x: self.l(x).reshape(x.shape[0], -1), l=linear()).eval(), (X,), {})
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X5), gm(X5))


def test_case_90_modes_around_a_call():
    model = nn.Sequential(linear(), nn.ReLU()).eval()
    gm = check(model, X.clone().requires_grad_())
    with torch.inference_mode():
        assert torch.equal(gm(X), model(X))
        assert torch.equal(trace(model, (X,), {})(X), model(X))


def test_numpy_numbers_and_constants():
    def forward(self, x):
        constant = torch.from_numpy(np.ones((1, 8), dtype=np.float32)) + torch.as_tensor(np.ones(8, dtype=np.float32))
        return x * np.float32(2) + np.sqrt(x.shape[1]) + constant

    check(model_of(forward), X, others=[(X5,)])


def test_constant_made_elsewhere_may_not_be_changed():
    def forward(self, x):
        total = torch.from_numpy(np.zeros((3, 8), dtype=np.float32))
        total += x
        return total

    with pytest.raises(TraceError, match="changes a tensor that it did not make with torch functions"):
        trace(model_of(forward).eval(), (X,), {}, frontend="trace")


def test_shape_in_many_places():
    def forward(self, x):
        b = x.shape[0]
        y = F.pad(x, (0, b, 1, 1))[: max(b, 2), : math.ceil(b / 2)].sum() + x[: round(b / 2)].sum() + divmod(b, 2)[1]
        z = x[None].expand(b, -1, -1).sum(0) + torch.tensor([b, x.shape[1]]).sum() + x.repeat(b, 1)[:1]
        return F.interpolate(z[:, None], size=x.shape[1] * 2) + y + F.adaptive_avg_pool1d(x[:, None], b).sum()

    check(model_of(forward), X, others=[(X5,), (torch.randn(2, 6),)])


def test_autocast_and_inference_mode_inside():
    def forward(self, x):
        with torch.inference_mode():
            y = self.l(x)
            y.add_(1)
        return y

    check(model_of(forward, l=linear()), X, others=[(X5,)])


def test_mutations_through_views_survive_dead_code_elimination():
    def view(self, x):
        y = x * 1
        y[0].add_(5)
        return y

    def base(self, x):
        y = x * 1
        z = y.t()
        y.mul_(2)
        return z + 1

    def functional(self, x):
        y = x * 1
        F.relu(y[0], inplace=True)
        return y

    def out(self, x):
        y = torch.empty(x.shape[0], 8)
        torch.add(x, 1, out=y[:, :])
        return y

    def dead_user(self, x):
        y = x * 1
        y.view(-1).add_(1) * 2
        return y

    def module(self, x):
        y = x * 1
        self.r(y[1])
        return y

    for forward in (view, base, functional, out, dead_user, module):
        check(model_of(forward, r=nn.ReLU(inplace=True)), X, others=[(X5,)])


def test_packed_sequences():
    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]

    model = model_of(forward, r=nn.LSTM(8, 4, batch_first=True))
    check(model, SEQ, torch.tensor([4, 2, 3]), others=[(SEQ[:2], torch.tensor([4, 1]))], pickles=False)


def test_vmap_is_refused_by_the_tracer():
    with pytest.raises(TraceError, match=r"vmap.*frontend='leaf'"):
        trace(model_of(lambda self, x: torch.vmap(lambda row: row * 2)(x)).eval(), (X,), {}, frontend="trace")
