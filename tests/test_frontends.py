"""torch.export as the second front end: the same form, bits, names and signature as the tracer gives."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.graph import module_of

X = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::fxq.api.KeptFloatWarning", "ignore::FutureWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout()
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.out.weight
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, x, *, bias=None, more):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        y = F.relu(self.drop(self.out(y)))
        y = self.tied(y + self.scale * more["y"][:, :, 1:2])
        return {"y": torch.cat([y, x], -1), "pair": (y.flatten(1), None)}


MORE = {"y": X + 1}


@pytest.fixture
def block():
    return Block().eval()


def test_exported_and_traced_compute_the_same(block):
    first = fxq.trace(block, (X,), example_kwargs={"more": MORE}, frontend="trace")
    second = fxq.trace(block, (X,), example_kwargs={"more": MORE}, frontend="export")
    for rows in (6, 2, 1):
        more = {"y": MORE["y"][:rows]}
        a, b = first(X[:rows], more=more), second(X[:rows], more=more)
        assert b["pair"][1] is None
        torch.testing.assert_close(a["y"], b["y"])
        torch.testing.assert_close(a["pair"][0], b["pair"][0])
    assert {"qkv", "out", "tied"} <= {module_of(node) for node in second.graph.nodes}
    with pytest.raises(fxq.GuardError, match=r"x.shape\[1\]` is 4"):
        second(X[:, :2], more={"y": MORE["y"][:, :2]})


def test_exported_model_is_quantized_under_the_users_names(block):
    qmodel = fxq.quantize(block, (X,), example_kwargs={"more": MORE}, frontend="export", check=True)
    report = fxq.report(qmodel)
    assert report.frontend == "torch.export, as asked"
    assert {d.module for d in report.decisions if d.op == "linear" and d.form == "int8"} == {"qkv", "out", "tied"}
    assert [d.form for d in report.decisions if d.op == "relu"] != []
    assert any(d.line.startswith("test_frontends.py:") for d in report.decisions)
    assert report.sqnr > 25
    assert fxq.compare(block, qmodel, (X,), kwargs={"more": MORE}).output > 25
    buffer = io.BytesIO()
    torch.save(qmodel, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(qmodel), torch.load(buffer, weights_only=False)):
        more = {"y": MORE["y"][:3]}
        assert torch.equal(twin(X[:3], more=more)["y"], qmodel(X[:3], more=more)["y"])


def test_an_exported_reshape_that_copies(model_of):
    """ATen spells it as a clone and a view: the clone goes, as every copy does, and the view copies where it must."""
    model = model_of(lambda self, x: self.l(x.transpose(0, 1).reshape(-1, 4)), l=nn.Linear(4, 2))
    assert fxq.quantize(model, X, frontend="export").report.sqnr > 25


def test_export_is_tried_where_the_root_cannot_be_traced():
    model = nn.Linear(16, 8).eval()

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = model

        def forward(self, x):
            return torch.vmap(self.l)(x)

    qmodel = fxq.quantize(Mapped().eval(), X)
    assert fxq.report(qmodel).frontend.startswith("torch.export, since test_frontends.py:")
    assert fxq.report(qmodel).int8_share == 1
    with pytest.raises(fxq.TraceError, match=r"test_frontends.py:\d+"):
        fxq.trace(Mapped().eval(), X, frontend="trace")


def test_what_neither_can_capture_names_the_users_line_once(model_of):
    model = model_of(lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(
        fxq.TraceError, match=r"^test_frontends.py:\d+ needs the value.*\(torch.export: .*pass frontend='leaf'"
    ):
        fxq.trace(model, X)
    with pytest.raises(fxq.TraceError, match=r"^torch.export"):
        fxq.trace(model, X, frontend="export")


def test_unknown_frontend():
    with pytest.raises(fxq.InputError, match="unknown frontend 'jit'; there are auto, trace, export"):
        fxq.trace(nn.Linear(16, 2).eval(), X, frontend="jit")


def test_numbers_are_guarded(model_of):
    gm = fxq.trace(model_of(lambda self, x, n: self.l(x) * n, l=nn.Linear(16, 2)), (X, 3), frontend="export")
    assert gm(X, 3).shape == (6, 4, 2)
    with pytest.raises(fxq.GuardError, match="`n` is 3"):
        gm(X, 4)


def test_buffers_and_inputs_that_the_model_changes(model_of):
    def forward(self, x):
        self.count.add_(1)
        x.mul_(2)
        return self.l(x) + self.count

    gm = fxq.trace(model_of(forward, l=nn.Linear(16, 2), count=torch.zeros(1)), X, frontend="export")
    x = X.clone()
    gm(x)
    assert float(gm.count) == 1
    assert torch.equal(x, 2 * X)


def test_no_grad_inside(model_of):
    def forward(self, x):
        with torch.no_grad():
            return self.l(x)

    gm = fxq.trace(model_of(forward, l=nn.Linear(16, 2)), X, frontend="export")
    assert gm(X[:2]).shape == (2, 4, 2)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(4), nn.ReLU6(), nn.Dropout(), nn.Linear(8, 4)),
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        nn.Sequential(nn.Linear(16, 8), nn.Hardtanh(), nn.Flatten(), nn.Linear(32, 4)),
    ],
    ids=["batch_norm", "transformer", "flatten"],
)
def test_modules(module):
    qmodel = fxq.quantize(module.eval(), X, frontend="export", check=True)
    linears = [d for d in fxq.report(qmodel).decisions if d.op == "linear"]
    assert linears
    assert {d.form for d in linears} == {"int8"}
    assert qmodel(X[:2]).shape[0] == 2


RELATIONS = {
    "equal": (lambda s, x, y: s.l(x) + y if x.shape[0] == y.shape[0] else s.l(x), (6, 5), r"`x.shape\[0\] == y"),
    "multiple": (lambda s, x, y: s.l(x) if x.shape[0] % 4 == 0 else s.l(x) * 2, (6, 6), r"x.shape\[0\] % 4"),
    "bound": (lambda s, x, y: s.l(x) if x.shape[0] > 7 else s.l(x) * 2, (4, 4), r"x.shape\[0\] > 7"),
    "not one": (lambda s, x, y: s.l(x) if x.shape[0] != 1 else s.l(x) * 2, (1, 8), r"x.shape\[0\] > 1"),
}


class TestWhatAnExportReliesOn:
    """Relations of sizes that `torch.export` found are guards, checked at call time."""

    @pytest.mark.parametrize("name", RELATIONS)
    def test_is_guarded(self, name):
        decide, rows, message = RELATIONS[name]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.l = nn.Linear(8, 8)

            def forward(self, x, y):
                return decide(self, x, y)

        model = Model().eval()
        gm = fxq.trace(model, (torch.randn(8, 8), torch.randn(8, 8)), frontend="export")
        x, y = torch.randn(16, 8), torch.randn(16, 8)
        assert torch.equal(gm(x, y), model(x, y))
        with pytest.raises(fxq.GuardError, match=f"torch.export decided that .*{message}.* is True on the example"):
            gm(torch.randn(rows[0], 8), torch.randn(rows[1], 8))

    def test_an_exception_that_the_model_catches_is_never_its_answer(self, model_of):
        def forward(self, x):
            try:
                return self.l(x) if x.sum() > 0 else 2 * self.l(x)
            except Exception:
                return self.l(x)

        model = model_of(forward, l=nn.Linear(8, 8))
        for frontend in ("auto", "trace", "export"):
            with pytest.raises(fxq.TraceError, match=r"needs the value of a tensor for Python \(`bool` of `gt`\)"):
                fxq.trace(model, torch.ones(8, 8), frontend=frontend)


def test_what_fails_on_another_batch_size_is_told_once(model_of, capfd):
    """Nothing on stderr: neither of the graph that was tried, nor of torch.export."""

    def forward(self, x):
        try:
            return self.l(x.view(-1, 32))
        except RuntimeError:
            return self.l(x)

    with pytest.raises(fxq.TraceError, match=r"fails on another batch size, which the model takes: shape '\[-1, 32\]'"):
        fxq.trace(model_of(forward, l=nn.Linear(16, 4)), torch.randn(6, 16))
    assert capfd.readouterr().err == ""
