"""Shared fixtures: instruction sets, a zoo of small models, and graphs as text."""

import contextlib
import hashlib
import os
import warnings
from collections import namedtuple

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq import kernels
from fxq.graph import target_name, unchanged
from fxq.inputs import Call
from fxq.kernels import binary
from fxq.ops import FAMILIES
from fxq.pipeline import Context, begin, run
from fxq.qdq import quantize
from fxq.recipe import Recipe

hypothesis.settings.register_profile("fxq", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fxq")


def pytest_sessionstart(session):
    """One binary for every instruction set, or that of FXQ_ISA, before anything looks for kernels; without a compiler
    there is none.
    """
    isa = os.environ.get("FXQ_ISA", binary.ALL)
    with contextlib.suppress(kernels.KernelError):
        binary.find(isa) or kernels.build(binary.cache(), isa)


@pytest.fixture(autouse=True, scope="session")
def _kernels():
    """Load the kernels, or settle for the portable ones, before any test could meet the warning that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.PortableKernelWarning)
        quantize(torch.zeros(1), 1.0, 0)  # the first call is the one that says so


@pytest.fixture(autouse=True, scope="session")
def _no_choice_by_time():
    """No test depends on a clock; those of `judge_costs` give it prices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passes.judge_costs.JudgeCosts.run", lambda self, gm, ctx: 0)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collectstart(collector):
    """What a test module draws while it is imported is the same in every run."""
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Tests of ops run on every instruction set of this processor, and on the portable kernels."""
    if "isa" in metafunc.fixturenames:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", kernels.PortableKernelWarning)
            metafunc.parametrize("isa", ["portable", *kernels.info().available])


@pytest.fixture
def on_isa(isa):
    """A function that runs an op of fxq on one instruction set: `on_isa(qlinear, x, ...)`."""

    def call(op, *args):
        if isa == "portable":
            return kernels.portable(op.name().partition("::")[2])(*args)
        with kernels.use_isa(isa):
            return op(*args)

    return call


def _model_of(forward, **members):
    module = type("Model", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
            module.register_buffer(name, member)
        else:
            setattr(module, name, member)
    return module.eval()


@pytest.fixture
def model_of():
    """`model_of(lambda self, x: ..., name=member)`: a module in eval mode with these members and this forward."""
    return _model_of


def _fingerprint(model):
    parts = [repr([(n, type(m), sorted(m.__dict__), m.training) for n, m in model.named_modules()]).encode()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts += [
            f"{name} {tensor.requires_grad} {tensor.dtype}".encode(),
            bytes(tensor.detach().flatten().tolist().__repr__(), "utf8"),
        ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture
def fingerprint():
    """A hash of everything that a model is: modules, attributes, parameters, buffers."""
    return _fingerprint


def _spell(value, names):
    if isinstance(value, torch.fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inside = ", ".join(_spell(item, names) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, slice):
        return ":".join("" if part is None else _spell(part, names) for part in (value.start, value.stop))
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _text(gm):
    names, lines = {}, []
    for node in gm.graph.nodes:
        operands = [_spell(arg, names) for arg in node.args]
        operands += [f"{key}={_spell(value, names)}" for key, value in node.kwargs.items()]
        if node.op in ("get_attr", "placeholder"):
            names[node] = str(node.target)
        elif node.op == "output":
            lines.append(f"return {operands[0]}")
        else:
            names[node] = f"%{len(lines)}"
            dot = "." if node.op == "call_method" else ""
            lines.append(f"%{len(lines)} = {dot}{target_name(node.target)}({', '.join(operands)})")
    return "\n".join(lines)


@pytest.fixture
def text():
    """A graph as text, one line per call, inputs and constants by name: `%1 = relu(%0)`."""
    return _text


@pytest.fixture
def staged():
    """`gm, ctx = staged(model, inputs, until)`: the graph as it stands before the pass named `until`.

    recipe: a `Recipe`, by default one that does not balance. The examples calibrate.
    """
    from passes import CONVERT, PREPARE

    def stage(model, inputs, until, recipe=None):
        from fxq import tracing

        call = Call(inputs if isinstance(inputs, tuple) else (inputs,))
        gm = tracing.trace(model.eval(), call.args, {})
        ctx = Context(recipe or Recipe(balance=False), FAMILIES, call.clone(), check=True)
        begin(gm, ctx)
        for step in (*PREPARE, *CONVERT):
            if step is CONVERT[0]:
                with torch.no_grad(), unchanged(gm):
                    gm(*call.clone().args)
            if step.name == until:
                return gm, ctx
            run((step,), gm, ctx)
        return gm, ctx

    return stage


@pytest.fixture
def normalized(staged, text):
    """The text of a model's graph before batch norms are folded, all numbers checked; a second run changes nothing."""
    from passes import PREPARE

    names = [step.name for step in PREPARE]
    steps = PREPARE[: names.index("fold-batch-norm")]

    def normalize_and_print(model, *inputs):
        gm, ctx = staged(model, inputs, "fold-batch-norm")
        once = text(gm)
        assert [step.run(gm, ctx) for step in steps] == [0] * len(steps)
        assert text(gm) == once
        return once

    return normalize_and_print


def _linear(n=8, m=8, **options):
    return nn.Linear(n, m, **options)


def _batch_norm(n=8):
    norm = nn.BatchNorm1d(n)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


Zoo = namedtuple("Zoo", "name model inputs")


def _attention(self, x):
    q, k, v = (self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)).unbind(0)
    scores = torch.softmax(q @ k.transpose(-2, -1) / 2, -1)
    return self.out((scores @ v).transpose(1, 2).reshape(x.shape)) + x


def _in_place(self, x):
    y = self.l(x)
    y.relu_()
    y += self.k(y)
    y[:, 0] = 0
    return self.k(y)


def _pieces(self, x):
    a, b = self.l(x).chunk(2, -1)
    c = self.l(x)[:, 2:6]
    return self.k(torch.cat([a, b, c], 0)), self.k(torch.stack([a, b])).transpose(0, 1)


def _reused(self, x):
    return self.r(self.l(self.r(self.l(self.r(self.l(x))))))


def _many(self, x, *, scale=1.0, y):
    return {"sum": self.l(x) + self.k(y), "scaled": [self.l(x) * scale, None], "n": x.shape[0]}


def _zoo():
    torch.manual_seed(1)
    x, seq, image = torch.randn(16, 8), torch.randn(4, 6, 8), torch.randn(2, 3, 4, 8)
    w, b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    tied = _model_of(lambda self, x: self.k(F.relu(self.l(x))), l=_linear(), k=_linear())
    tied.k.weight = tied.l.weight
    mlp = nn.Sequential(_linear(8, 16), nn.ReLU(), _linear(16, 16, bias=False), nn.ReLU6(), _linear(16, 3))
    return [
        Zoo("linear", _linear(8, 3), (x,)),
        Zoo("mlp", mlp, (x,)),
        Zoo("residual", _model_of(lambda s, x: s.k(F.relu(s.l(x) + x)), l=_linear(), k=_linear()), (x,)),
        Zoo("pieces", _model_of(_pieces, l=_linear(), k=_linear(4, 5)), (x,)),
        Zoo("transpose", _model_of(lambda s, x: s.k(s.l(x).mT.flatten(1)), l=_linear(), k=_linear(48, 4)), (seq,)),
        Zoo("pool1d", _model_of(lambda s, x: s.k(F.max_pool1d(s.l(x), 3, 2, 1)), l=_linear(), k=_linear(4)), (seq,)),
        Zoo("pool2d", nn.Sequential(_linear(), nn.MaxPool2d(2, padding=1), nn.Flatten(), _linear(45, 4)), (image,)),
        Zoo("batch_norm", nn.Sequential(_linear(), _batch_norm(), nn.ReLU(), _linear(), _batch_norm()), (x,)),
        Zoo("shared", _model_of(lambda s, x: s.l(F.relu(s.l(F.relu(s.l(x))))), l=_linear()), (x,)),
        Zoo("tied", tied, (x,)),
        Zoo("attention", _model_of(_attention, qkv=_linear(8, 24), out=_linear()), (seq,)),
        Zoo("functional", _model_of(lambda s, x: F.linear(F.relu(x @ s.w.t()), weight=s.w, bias=s.b), w=w, b=b), (x,)),
        Zoo("in_place", _model_of(_in_place, l=_linear(), k=_linear()), (x,)),
        Zoo("dropout", nn.Sequential(_linear(), nn.Dropout(), nn.ReLU(inplace=True), nn.Identity(), _linear()), (x,)),
        Zoo("reused_relu", _model_of(_reused, l=_linear(), r=nn.ReLU()), (x,)),
        Zoo("scalars", _model_of(lambda s, x: s.k((1 + s.l(x)) * 0.5 - 1), l=_linear(), k=_linear()), (x,)),
        Zoo("clamps", _model_of(lambda s, x: s.k(s.l(x).clamp(-0.5, 0.75).relu()), l=_linear(), k=_linear()), (x,)),
        Zoo("outputs", _model_of(lambda s, x, y: (s.l(x), (x, s.l(x) + s.k(y))), l=_linear(), k=_linear()), (x, x + 1)),
    ]


@pytest.fixture(params=range(18), ids=[entry.name for entry in _zoo()])
def zoo(request):
    """One small model in eval mode with example inputs: `.name`, `.model`, `.inputs`."""
    entry = _zoo()[request.param]
    entry.model.eval()
    return entry


@pytest.fixture
def keyword_model():
    """A model with a keyword-only argument, a number and nested outputs, with its positional and keyword inputs."""
    model = _model_of(_many, l=_linear(), k=_linear())
    return model, (torch.randn(16, 8),), {"scale": 0.5, "y": torch.randn(16, 8)}
