"""What people's models hold, the first forty cases by how often, each from the float model to the integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.decisions import Reason
from fxq.tracing import TracingWarning

X, SEQ = torch.randn(256, 8), torch.randn(64, 6, 8)
OTHER = torch.randn(5, 8)


def linear(n=8, m=8, **options):
    return nn.Linear(n, m, **options)


@pytest.fixture
def check(fingerprint):
    """Quantize with every promise checked; 25 dB on the examples and 15 on other inputs. Returns the forms of calls.

    `ops` then holds the integer ops of the result by name, with the layers inside chains.
    """

    def quantize_and_check(model, *inputs, others=(), at_least=25, **options):
        model.eval()
        before = fingerprint(model)
        qmodel = fxq.quantize(
            model, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs), check=True, **options
        )
        assert fingerprint(model) == before
        assert qmodel.report.sqnr >= at_least
        for other in others:
            copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in other] for _ in range(2)]
            with torch.no_grad():
                assert output_sqnr(model(*copies[0]), qmodel(*copies[1])) >= 15
        return qmodel

    return quantize_and_check


def forms(qmodel):
    """What became of each call that computes with numbers."""
    return ", ".join(f"{d.op} {d.form}" for d in qmodel.report.decisions if d.form != "aside")


def ops(qmodel):
    """Names of all integer ops, those inside chains too."""
    from fxq.expansion import expand

    nodes = expand(qmodel).graph.nodes
    return [n.target.name().removeprefix("fxq::") for n in nodes if isinstance(n.target, torch._ops.OpOverload)]


def test_case_01_sequential_and_a_bare_linear(check):
    qmodel = check(nn.Sequential(linear(), nn.ReLU(), linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear_float"]
    assert qmodel(X).dtype == torch.float32
    assert ops(check(linear(), X, others=[(OTHER,)])) == ["quantize", "qlinear_float"]


def test_case_02_view_of_the_batch_size(check, model_of):
    model = model_of(lambda s, x: s.l(x.view(x.size(0), -1)), l=linear(48))
    qmodel = check(model, SEQ, others=[(torch.randn(9, 6, 8),), (torch.randn(1, 6, 8),)])
    assert qmodel.report.int8_share == 1


def test_case_03_the_transformer_idiom(check, model_of):
    def forward(self, x):
        b, t, c = x.shape
        return self.k(F.relu(self.l(x.reshape(b * t, c))).view(b, t, -1))

    qmodel = check(model_of(forward, l=linear(), k=linear()), SEQ, others=[(torch.randn(3, 5, 8),)])
    assert forms(qmodel).endswith("linear int8, relu int8, reshape moved, linear int8")
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear_float"]


def test_case_04_branch_on_the_batch_size(check, model_of):
    model = model_of(lambda s, x: s.l(x) if x.shape[0] > 2 else s.k(x), l=linear(), k=linear())
    qmodel = check(model, X, others=[(OTHER,)])
    assert qmodel.report.guards
    with pytest.raises(fxq.GuardError, match=r"test_edge_cases.py:\d+ decided .*shape\[0\]"):
        qmodel(X[:1])


def test_case_05_asserts_on_shapes(check, model_of):
    def forward(self, x):
        assert x.shape[1] == 8
        assert x.dim() == 2
        return self.l(x)

    qmodel = check(model_of(forward, l=linear()), X, others=[(OTHER,)])
    with pytest.raises(fxq.GuardError):
        qmodel(torch.randn(3, 4, 8))


def masked(self, x, mask=None):
    y = self.l(x)
    return y if mask is None else self.k(y.masked_fill(mask, 0))


def test_case_06_a_mask_that_is_left_out(check, model_of):
    qmodel = check(model_of(masked, l=linear(), k=linear()), X, others=[(OTHER,), (OTHER, None)])
    with pytest.raises(fxq.GuardError, match="mask"):
        qmodel(X, X > 0)


def test_case_07_a_mask_that_is_given(check, model_of):
    qmodel = check(model_of(masked, l=linear(), k=linear()), X, X > 0, others=[(OTHER, OTHER > 1)])
    assert forms(qmodel) == "linear int8, masked_fill float, linear int8"


@pytest.mark.filterwarnings("error")
def test_case_08_training_flag(model_of):
    def forward(self, x):
        return self.l(F.dropout(x, 0.5, self.training) if self.training else x)

    model = model_of(forward, l=linear()).train()
    with pytest.warns(TracingWarning, match="training mode"):
        qmodel = fxq.quantize(model, X)
    assert torch.equal(qmodel(X), qmodel(X))
    assert model.training


def test_case_09_dropout_between_linear_and_relu(check):
    qmodel = check(nn.Sequential(linear(), nn.Dropout(), nn.ReLU(), nn.Dropout(), linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear_float"]


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(inplace=True),
        F.relu_,
        lambda x: x.relu_(),
        lambda x: x.relu(),
        torch.relu,
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_(0),
    ],
)
def test_case_10_spellings_of_relu(relu, check, model_of):
    model = model_of(lambda s, x: s.k(relu(s.l(x))), l=linear(), k=linear())
    qmodel = check(model, X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear_float"]


def test_case_11_one_relu_used_three_times(check):
    relu = nn.ReLU()
    qmodel = check(nn.Sequential(linear(), relu, linear(), relu, linear(), relu, linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear", "qlinear", "qlinear_float"]


def test_case_12_a_linear_that_relu_and_another_read(check, model_of):
    def forward(self, x):
        y = self.l(x)
        return self.k(F.relu(y)) + self.k(y)

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    node = next(n for n in qmodel.graph.nodes if n.target is torch.clamp)
    assert node.meta["value"].dtype == torch.uint8  # a clamp of its own, on integers


def test_case_13_relu_in_place_is_seen_by_all(check, model_of):
    def forward(self, x):
        y = self.l(x)
        r = F.relu_(y)
        return self.k(y + r)

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert "lookup" in ops(qmodel)  # y + r is 2 * relu, a function of one tensor


def test_case_14_one_linear_in_a_loop(check, model_of):
    def forward(self, x):
        for _ in range(4):
            x = self.l(x).relu()
        return x

    qmodel = check(model_of(forward, l=linear()), X, others=[(OTHER,)])
    packed = {str(n.target) for n in qmodel.graph.nodes if n.op == "get_attr" and "packed" in str(n.target)}
    assert packed == {"l.weight_packed"}


def test_case_15_one_module_under_two_names(check, model_of):
    shared = linear()
    model = model_of(lambda s, x: s.b(s.a(x).relu() * 3), a=shared, b=shared)
    qmodel = check(model, X, others=[(OTHER,)])
    assert len([n for n in qmodel.graph.nodes if "packed" in str(n.target)]) <= 2
    assert qmodel.report.int8_share == 1


def test_case_16_tied_weights(check, model_of):
    model = model_of(lambda s, x: s.b(s.a(x).relu()), a=linear(), b=linear())
    model.b.weight = model.a.weight
    qmodel = check(model, X, others=[(OTHER,)])
    assert len([name for name in qmodel.state_dict() if "packed" in name]) == 1


def test_case_17_embedding_tied_to_the_head(check, model_of):
    model = model_of(lambda s, i: F.linear(s.l(s.e(i)), s.e.weight), e=nn.Embedding(20, 8), l=linear())
    qmodel = check(model, torch.randint(0, 20, (4, 5)), others=[(torch.randint(0, 20, (2, 3)),)])
    assert forms(qmodel) == "embedding int8, linear int8, linear int8"


W, B = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
PRODUCTS = {
    18: lambda s, x: F.linear(x, s.w, s.b),
    19: lambda s, x: F.linear(input=x, weight=s.w, bias=s.b),
    20: lambda s, x: x @ s.w.t(),
    21: lambda s, x: torch.addmm(s.b, x, s.w),
}


def product(case, check, model_of):
    qmodel = check(model_of(PRODUCTS[case], w=W, b=B), X, others=[(OTHER,)])
    assert forms(qmodel) == "linear int8"
    assert not any(name in ("w", "w_t") for name in qmodel.state_dict())


def test_case_18_functional_linear(check, model_of):
    product(18, check, model_of)


def test_case_19_functional_linear_by_keywords(check, model_of):
    product(19, check, model_of)


def test_case_20_matmul_with_a_transposed_parameter(check, model_of):
    product(20, check, model_of)


def test_case_21_addmm(check, model_of):
    product(21, check, model_of)


def test_case_22_einsum_is_a_linear_or_reported(check, model_of):
    qmodel = check(model_of(lambda s, x: torch.einsum("bi,oi->bo", x, s.w), w=W), X, others=[(OTHER,)])
    assert forms(qmodel) == "linear int8"
    model = model_of(lambda s, x: torch.einsum("bi,bi->b", x, x + s.w[0]), w=W)
    report = fxq.quantize(model, X).report
    (decision,) = report.refusals()
    assert (decision.op, decision.form, decision.reason) == ("einsum", "float", Reason.NO_INTEGER_OP)
    assert decision.macs == X.numel()
    with pytest.raises(fxq.QuantizationError, match="einsum"):
        fxq.quantize(model, X, strict=True)


def test_case_23_residuals(check, model_of):
    qmodel = check(model_of(lambda s, x: s.k(F.relu(s.l(x) + x)), l=linear(), k=linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qadd", "qlinear_float"]
    qmodel = check(model_of(lambda s, x: s.l(x) + x, l=linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear_float"]
    assert forms(qmodel) == "linear int8, add int8"


def test_case_24_scalars(check, model_of):
    def forward(self, x):
        y = self.l(x)
        y += 1
        return self.k(1 + y * 2.0)

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert qmodel.report.int8_share == 1


def test_case_25_writing_a_column(check, model_of):
    def forward(self, x):
        y = self.l(x)
        y[:, 0] = 0
        return self.k(y)

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert qmodel.report.int8_share == 1


def test_case_26_cat_of_two_linears(check, model_of):
    model = model_of(lambda s, x: s.h(torch.cat([s.l(x), s.k(x) * 1], 1)), l=linear(), k=linear(), h=linear(16))
    check(model, X, others=[(OTHER,)])
    model = model_of(lambda s, x: s.h(torch.cat([s.l(x), s.k(x)], 1)), l=linear(), k=linear(), h=linear(16))
    qmodel = check(model, X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear", "qlinear_float"]


def test_case_27_zeros_of_the_batch_size(check, model_of):
    model = model_of(lambda s, x: s.l(torch.cat([x, torch.zeros(x.shape[0], 8)], 1)), l=linear(16))
    check(model, X, others=[(OTHER,)])


def test_case_28_arange_and_constants(check, model_of):
    def forward(self, x):
        position = torch.arange(x.shape[0]).unsqueeze(1) / 8.0
        return self.l(x + position) * torch.tensor(2.0) + torch.zeros_like(x)

    check(model_of(forward, l=linear()), X, others=[(OTHER,)])


def test_case_29_to_the_device_of_a_weight(check, model_of):
    qmodel = check(model_of(lambda s, x: s.l(x.to(s.l.weight.device)), l=linear()), X, others=[(OTHER,)])
    assert qmodel.report.int8_share == 1


def test_case_30_conversions(check, model_of):
    qmodel = check(model_of(lambda s, x: s.k(s.l(x.float()).to(torch.float32).type_as(x)), l=linear(), k=linear()), X)
    assert forms(qmodel) == "linear int8, linear int8"
    model = model_of(lambda s, x: s.k(s.l(x).to(torch.float64).sin().float()), l=linear(), k=linear())
    qmodel = check(model, X, others=[(OTHER,)])
    assert {d.reason for d in qmodel.report.kept_float()} == {Reason.NOT_FLOAT32, Reason.NO_INTEGER_OP}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_case_31_other_dtypes_say_what_is_needed(dtype):
    with pytest.raises(fxq.InputError, match=rf"{dtype}.*\.float\(\)"):
        fxq.quantize(nn.Sequential(linear()).to(dtype).eval(), X.to(dtype))


def test_case_32_len(check, model_of):
    check(model_of(lambda s, x: s.l(x) * len(x), l=linear()), X)


def test_case_33_int_of_a_size(check, model_of):
    check(model_of(lambda s, x: s.l(x[:, : int(x.shape[1] * 0.5)]), l=linear(4)), X, others=[(OTHER,)])


def test_case_34_range_of_a_size(check, model_of):
    def forward(self, x):
        return torch.stack([self.l(x[i]) for i in range(x.shape[0])])

    qmodel = check(model_of(forward, l=linear()), X[:3])
    with pytest.raises(fxq.GuardError):
        qmodel(X)


def test_case_35_loop_over_chunks(check, model_of):
    model = model_of(lambda s, x: sum(s.l(t) for t in x.chunk(2)), l=linear())
    check(model, X, others=[(torch.randn(6, 8),)])


def test_case_36_unpacked_chunks(check, model_of):
    def forward(self, x):
        a, b = self.l(x).chunk(2, -1)
        return self.k(torch.cat([b, a], -1))

    qmodel = check(model_of(forward, l=linear(), k=linear()), X, others=[(OTHER,)])
    assert ops(qmodel) == ["quantize", "qlinear", "qlinear_float"]


def test_case_37_starred_shape(check, model_of):
    def forward(self, x):
        b, *rest = x.shape
        return self.l(x.reshape(b, rest[0] * rest[1]))

    check(model_of(forward, l=linear(48)), SEQ, others=[(torch.randn(7, 6, 8),)])


def test_case_38_containers_of_modules(check, model_of):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.by_name["a"](x) + self.layers[self.i](x) + getattr(self, "l")(x)  # noqa: B009

    members = {"layers": nn.ModuleList([linear(), linear()]), "by_name": nn.ModuleDict({"a": linear()}), "l": linear()}
    qmodel = check(model_of(forward, i=1, **members), X, others=[(OTHER,)])
    assert qmodel.report.int8_share == 1
    assert {"layers.0", "layers.1", "by_name.a", "l"} <= {d.module for d in qmodel.report.decisions}


def test_case_39_slice_of_a_sequential(check, model_of):
    model = model_of(lambda s, x: s.q[:2](x) + s.q[2](x), q=nn.Sequential(linear(), nn.ReLU(), linear()))
    assert check(model, X, others=[(OTHER,)]).report.int8_share == 1


def test_case_40_parameter_lists_and_digits_in_paths(check, model_of):
    members = {"p": nn.ParameterList([torch.randn(8, 8)]), "s": nn.Sequential(nn.Sequential(linear()))}
    qmodel = check(model_of(lambda s, x: s.s(x) @ s.p[0], **members), X, others=[(OTHER,)])
    assert forms(qmodel) == "linear int8, linear int8"
    assert qmodel.report.decisions[0].module == "s.0.0"
