"""The hundred cases of docs/tracing.md: each a small model and its inputs, the same for every tool."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxq.comparison import output_sqnr
from fxq.tracing.values import tensors

MIN_SQNR = 15
"""dB; a result below it is not right."""
RANDOM = torch.Generator().manual_seed(0)
X, OTHER, SEQ, OTHER_SEQ, IMAGE, OTHER_IMAGE = (
    torch.randn(*shape, generator=RANDOM)
    for shape in ((64, 8), (16, 8), (16, 6, 8), (8, 6, 8), (8, 4, 8, 8), (4, 4, 8, 8))
)
IDS = torch.randint(0, 20, (16, 5), generator=RANDOM)


@dataclass(frozen=True)
class Case:
    """A model, the positional arguments that it is traced with, and others that it must also be right on.

    holds: what else must be true of a result, given the model. twice: convert the result once more. compares: whether
    the model itself has an output worth comparing on the examples.
    """

    number: int
    title: str
    model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    others: tuple[tuple[Any, ...], ...]
    holds: Callable[[Any, nn.Module], bool] | None = None
    twice: bool = False
    compares: bool = True


CASES: list[Case] = []


def case(
    number: int,
    title: str,
    forward: Callable[..., Any] | nn.Module,
    *inputs: Any,
    others: tuple[tuple[Any, ...], ...] = (),
    holds: Callable[[Any, nn.Module], bool] | None = None,
    twice: bool = False,
    compares: bool = True,
    dress: Callable[[nn.Module], nn.Module | None] | None = None,
    **members: Any,
) -> None:
    """Add a case: a module, or a module with this forward and these members. dress: what else is done to it."""

    def make() -> nn.Module:
        if isinstance(forward, nn.Module):
            model = copy.deepcopy(forward)
        else:
            model = type("Model", (nn.Module,), {"forward": forward})()
            for name, member in members.items():
                member = copy.deepcopy(member)
                if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                    model.register_buffer(name, member)
                else:
                    setattr(model, name, member)
        model.eval()
        return (dress(model) or model) if dress is not None else model

    CASES.append(Case(number, title, make, inputs or (X,), others, holds, twice, compares))


def linear(n: int = 8, m: int = 8, **options: Any) -> nn.Linear:
    """A linear with reproducible weights."""
    torch.manual_seed(n * 1000 + m)
    return nn.Linear(n, m, **options)


def no_effect(action: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    """An action on a model, for `dress`."""

    def act(model: nn.Module) -> None:
        with torch.no_grad():
            action(model)

    return act


L, K, H = linear(), linear(8, 8, bias=True), linear(16)
W, B = nn.Parameter(linear().weight.detach().clone()), nn.Parameter(linear().bias.detach().clone())
MLP = nn.Sequential(linear(), nn.ReLU(), linear())


class Pair(NamedTuple):
    """An output with names."""

    first: Any
    second: Any


@dataclass
class Output:
    """An output that is a dataclass."""

    hidden: Any
    state: Any = None


def helper(x: Any) -> Any:
    """A function with data-dependent control flow, which fx is told to leave alone."""
    return x.flip(0) if x.sum() > 0 else x


torch.fx.wrap("helper")


class Double(torch.autograd.Function):
    """An autograd.Function."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        """Twice x."""
        return x * 2


class Scaled(nn.Linear):
    """A linear that is not one."""

    def forward(self, x: Any) -> Any:
        """Twice what a linear gives."""
        return super().forward(x) * 2


def transformer_idiom(self: Any, x: Any) -> Any:
    """Flatten batch and time and take them apart again."""
    b, t, c = x.shape
    return self.k(F.relu(self.l(x.reshape(b * t, c))).view(b, t, -1))


def asserting(self: Any, x: Any) -> Any:
    """Check shapes."""
    assert x.shape[1] == 8
    assert x.dim() == 2
    return self.l(x)


def masked(self: Any, x: Any, mask: Any = None) -> Any:
    """Take an optional mask."""
    y = self.l(x)
    return y if mask is None else y.masked_fill(mask, 0)


def aliased(self: Any, x: Any) -> Any:
    """Modify in place what is read again."""
    y = self.l(x)
    r = F.relu_(y)
    return self.k(y + r)


def looped(self: Any, x: Any) -> Any:
    """Call one layer four times."""
    for _ in range(4):
        x = self.l(x).relu() * 2
    return x


def used_twice(self: Any, x: Any) -> Any:
    """Read a linear's result before and after its relu."""
    y = self.l(x)
    return self.k(F.relu(y)) + self.k(y)


def column(self: Any, x: Any) -> Any:
    """Write into a column."""
    y = self.l(x)
    y[:, 0] = 0
    return self.k(y)


def halves(self: Any, x: Any) -> Any:
    """Swap the halves."""
    a, b = self.l(x).chunk(2, -1)
    return self.k(torch.cat([b, a], -1))


def starred(self: Any, x: Any) -> Any:
    """Flatten all but the first dimension."""
    b, *rest = x.shape
    return self.l(x.reshape(b, rest[0] * rest[1]))


def containers(self: Any, x: Any) -> Any:
    """Find modules in containers."""
    for layer in self.layers:
        x = layer(x).relu()
    return self.by_name["a"](x) + self.layers[self.i](x) + getattr(self, "l")(x)  # noqa: B009


def until_small(self: Any, x: Any) -> Any:
    """Decide on data."""
    while x.abs().max() > 10:
        x = x / 2
    return self.l(x)


def attention(self: Any, x: Any) -> Any:
    """Attention written out."""
    b, t, c = x.size()
    q, k, v = self.qkv(x).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    y = torch.softmax((q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1)), -1) @ v
    return self.out(y.transpose(1, 2).reshape(b, t, c))


def caching(self: Any, x: Any) -> Any:
    """Leave a result on the module."""
    self.cache = self.l(x)
    return self.cache * 2


def printing(self: Any, x: Any) -> Any:
    """Print a shape."""
    print(f"{x.shape}")
    return self.l(x)


def counting(self: Any, x: Any) -> Any:
    """Modify a buffer."""
    self.buf.add_(1)
    return self.l(x) + self.buf


def trying(self: Any, x: Any) -> Any:
    """Use contexts."""
    try:
        y = self.l(x)
    except ValueError:
        y = x
    with torch.no_grad():
        return y + 1 if torch.jit.is_scripting() else y - 1


def selecting(self: Any, x: Any) -> Any:
    """Select rows by their values."""
    y = self.l(torch.where(x > 0, x, x.topk(2).values[:, :1]))
    return self.k(y[x[:, 0] > 0])


def norm(n: int = 8, **options: Any) -> nn.BatchNorm1d:
    """A batch norm whose statistics are not the identity's."""
    made = nn.BatchNorm1d(n, **options)
    if made.running_mean is not None and made.running_var is not None:
        made.running_mean.copy_(torch.linspace(-1, 1, n))
        made.running_var.copy_(torch.linspace(0.5, 2, n))
    return made


def hooked(model: Any) -> None:
    """Add hooks that change what comes out."""
    model.register_forward_hook(lambda module, args, out: out * 3)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, out: out + args[0])


def tie(model: Any) -> None:
    """Give two linears one weight."""
    model.k.weight = model.l.weight


def scripted(model: Any) -> nn.Module:
    """Script a submodule."""
    model.s = torch.jit.script(nn.Sequential(linear(), nn.Tanh()))
    return model


def fresh(value: Any) -> Any:
    """The same arguments in memory of their own."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)


def runs(result: Any, *args: Any) -> Any:
    """Run on copies of the arguments."""
    with torch.no_grad():
        return result(*fresh(args))


def is_right(expected: Any, actual: Any) -> bool:
    """The same structure, and 15 dB or more."""
    if pytree.tree_structure(expected) != pytree.tree_structure(actual):
        return False
    pairs = list(zip(tensors(expected), tensors(actual), strict=True))
    return all(x.shape == y.shape for x, y in pairs) and output_sqnr(expected, actual) >= MIN_SQNR


def copies_are_equal(result: Any, model: nn.Module) -> bool:
    """deepcopy, pickle, torch.jit.trace and torch.export of the result give its bits on another batch."""
    expected = runs(result, OTHER)
    exported = torch.export.export(result, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    others = (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), torch.jit.trace(result, X), exported.module())
    return all(torch.equal(runs(other, OTHER), expected) for other in others)


def threads_agree(result: Any, model: nn.Module) -> bool:
    """Two threads get what one gets."""
    expected, wrong = [runs(result, X), runs(result, OTHER)], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(runs(result, (X, OTHER)[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not wrong


def thread_counts_agree(result: Any, model: nn.Module) -> bool:
    """1, 2 and 4 threads of torch's give the same bits."""
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(runs(result, X))
    torch.set_num_threads(before)
    return all(torch.equal(y, found[0]) for y in found)


def modes_agree(result: Any, model: nn.Module) -> bool:
    """inference_mode, inputs that require gradients and autocast change nothing."""
    expected = runs(result, X)
    found = [result(X.clone().requires_grad_())]
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            found.append(result(X))
    return all(is_right(expected, y.detach().float()) for y in found)


def settings_agree(result: Any, model: nn.Module) -> bool:
    """Global settings change nothing."""
    expected = runs(result, X)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        return torch.equal(runs(result, X), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(precision)


def finite(result: Any, model: nn.Module) -> bool:
    """No NaN and no infinity on ordinary inputs."""
    return bool(torch.isfinite(runs(result, X)).all())


def leaves_no_tensor(result: Any, model: nn.Module) -> bool:
    """Nothing of the trace is left on the model."""
    return not hasattr(model, "cache")


def zeros(model: Any) -> None:
    """A row of zeros."""
    model[0].weight[3] = 0


def outlier(model: Any) -> None:
    """One weight that dwarfs the others."""
    model[0].weight[3, 3] = 1e4


def tiny(model: Any) -> None:
    """Weights close to the smallest float."""
    model[0].weight.mul_(1e-38)


def minus_128(model: Any) -> None:
    """A weight at the end of the affine range."""
    model[0].weight[0] = torch.tensor([-128.0, 127, 64, -64, 0, 1, -1, 100]) / 128


NAN = X.clone()
NAN[3, 5] = float("nan")
LONG = torch.randn(4, 70000, generator=RANDOM)
CONV, LSTM, MHA = nn.Conv2d(4, 8, 3, padding=1), nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2)
batch, seqs, images = ((OTHER,),), ((OTHER_SEQ,),), ((OTHER_IMAGE,),)
torch.manual_seed(0)

case(1, "Linear, ReLU, Linear", MLP, others=batch)
case(2, "`x.view(x.size(0), -1)`", lambda s, x: s.l(x.view(x.size(0), -1)), SEQ, others=seqs, l=linear(48))
case(3, "`b, t, c = x.shape`, reshape, view", transformer_idiom, SEQ, others=seqs, l=L, k=K)
case(4, "`if x.shape[0] > 2`", lambda s, x: s.l(x) if x.shape[0] > 2 else s.k(x), others=((OTHER,), (X[:1],)), l=L, k=K)
case(5, "asserts on shapes", asserting, others=batch, l=L)
case(6, "optional mask left out", masked, others=batch, l=L)
case(7, "optional mask given", masked, X, X > 0, others=((OTHER, OTHER > 1),), l=L)
case(8, "`F.dropout(x, p, self.training)`", lambda s, x: s.l(F.dropout(x, 0.5, s.training)), others=batch, l=L)
case(9, "Dropout between Linear and ReLU", nn.Sequential(linear(), nn.Dropout(), nn.ReLU(), linear()), others=batch)
case(10, "relu in place", lambda s, x: s.k(s.l(x).relu_()), others=batch, l=L, k=K)
RELU = nn.ReLU()
case(11, "one ReLU used three times", nn.Sequential(linear(), RELU, linear(), RELU, linear(), RELU), others=batch)
case(12, "a linear that relu and another read", used_twice, others=batch, l=L, k=K)
case(13, "in-place relu seen through an alias", aliased, others=batch, l=L, k=K)
case(14, "one Linear in a loop", looped, others=batch, l=linear())
case(15, "one module under two names", lambda s, x: s.b(s.a(x).relu() * 30), others=batch, a=L, b=K,
     dress=lambda m: setattr(m, "b", m.a))  # fmt: skip
case(16, "two Linears with one weight", lambda s, x: s.k(s.l(x).relu()), others=batch, l=L, k=K, dress=tie)
case(17, "head tied to the embedding", lambda s, i: F.linear(s.l(s.e(i)), s.e.weight), IDS, others=((IDS[:3],),),
     e=nn.Embedding(20, 8), l=L)  # fmt: skip
case(18, "`F.linear(x, self.w, self.b)`", lambda s, x: F.linear(x, s.w, s.b), others=batch, w=W, b=B)
case(19, "`F.linear` by keywords", lambda s, x: F.linear(input=x, weight=s.w, bias=s.b), others=batch, w=W, b=B)
case(20, "`x @ self.w.t()`", lambda s, x: x @ s.w.t(), others=batch, w=W)
case(21, "`torch.addmm(b, x, w)`", lambda s, x: torch.addmm(s.b, x, s.w), others=batch, w=W, b=B)
case(22, "`torch.einsum('bi,oi->bo', x, w)`", lambda s, x: torch.einsum("bi,oi->bo", x, s.w), others=batch, w=W)
case(23, "residual", lambda s, x: s.k(F.relu(s.l(x) + x)), others=batch, l=L, k=K)
case(24, "scalars", lambda s, x: s.k((1 + s.l(x)) * 2.0), others=batch, l=L, k=K)
case(25, "`y[:, 0] = 0`", column, others=batch, l=L, k=K)
case(26, "cat of two linears", lambda s, x: s.h(torch.cat([s.l(x), s.k(x)], 1)), others=batch, l=L, k=K, h=H)
case(27, "`torch.zeros(x.shape[0], 8)`", lambda s, x: s.h(torch.cat([x, torch.zeros(x.shape[0], 8)], 1)),
     others=batch, h=H)  # fmt: skip
case(28, "`torch.arange(x.shape[0])`", lambda s, x: s.l(x + torch.arange(x.shape[0]).unsqueeze(1) / 64),
     others=batch, l=L)  # fmt: skip
case(29, "`x.to(self.l.weight.device)`", lambda s, x: s.l(x.to(s.l.weight.device)), others=batch, l=L)
case(
    30, "`.to(float64)` in the middle", lambda s, x: s.k(s.l(x).to(torch.float64).sin().float()), others=batch, l=L, k=K
)
case(31, "float64 model", nn.Sequential(linear()).double(), X.double(), others=((OTHER.double(),),))
case(32, "`len(x)`", lambda s, x: s.l(x) * len(x), others=batch, l=L)
case(33, "`int(x.shape[1] * 0.5)`", lambda s, x: s.l(x[:, : int(x.shape[1] * 0.5)]), others=batch, l=linear(4))
case(34, "`for i in range(x.shape[0])`", lambda s, x: torch.stack([s.l(x[i]) for i in range(x.shape[0])]), X[:3],
     others=((X[:5],),), l=L)  # fmt: skip
case(35, "`for t in x.chunk(2)`", lambda s, x: sum(s.l(t) for t in x.chunk(2)), others=batch, l=L)
case(36, "`a, b = x.chunk(2, -1)`", halves, others=batch, l=L, k=K)
case(37, "`b, *rest = x.shape`", starred, SEQ, others=seqs, l=linear(48))
case(38, "ModuleList, ModuleDict, getattr", containers, others=batch, l=L, i=1,
     layers=nn.ModuleList([linear(), linear()]), by_name=nn.ModuleDict({"a": linear()}))  # fmt: skip
case(39, "slice of a Sequential", lambda s, x: s.q[:2](x), others=batch, q=MLP)
case(40, "ParameterList, digits in paths", lambda s, x: s.q[0][0](x) @ s.p[0], others=batch,
     q=nn.Sequential(nn.Sequential(linear())), p=nn.ParameterList([W.detach().clone()]))  # fmt: skip
case(41, "`forward(*args)`", lambda s, *args: s.l(args[0]) + args[1], X, X, others=((OTHER, OTHER),), l=L)
case(42, "`forward(x, **kw)`", lambda s, x, **kw: s.l(x + sum(kw.values())), others=batch, l=L)
case(43, "`for t in xs`", lambda s, xs: sum(s.l(x) for x in xs), [X, X + 1], others=(([OTHER, OTHER],),), l=L)
case(44, "namedtuple with None as output", lambda s, x: Pair(s.l(x), None), others=batch, l=L)
case(45, "dataclass as output", lambda s, x: Output(s.l(x)), others=batch, l=L)
case(46, "float argument", lambda s, x, alpha: s.l(x) * alpha, X, 0.5, others=((OTHER, 0.25),), l=L)
case(47, "bool argument in `if`", lambda s, x, flag: s.l(x) if flag else x, X, True, others=((OTHER, True),), l=L)
case(48, "int argument as dim", lambda s, x, dim: s.l(x).softmax(dim), X, 1, others=((X, 0),), l=L)
case(49, "ids into an Embedding", nn.Sequential(nn.Embedding(20, 8), linear()), IDS, others=((IDS[:3],),))
case(50, "`x.max().item()`", lambda s, x: s.l(x) * x.max().item(), others=batch, l=L)
case(51, "through NumPy", lambda s, x: torch.from_numpy(np.tanh(s.l(x).numpy())), others=batch, l=L)
case(52, "`while x.abs().max() > 10`", until_small, others=((20 * X,),), l=L)
case(53, "`isinstance(x, torch.Tensor)`", lambda s, x: s.l(x) if isinstance(x, torch.Tensor) else s.k(x), others=batch,
     l=L, k=K)  # fmt: skip
case(54, "`torch.fx.wrap` helper", lambda s, x: s.k(helper(s.l(x))), others=((-X,), (OTHER,)), l=L, k=K)
case(55, "autograd.Function", lambda s, x: s.k(Double.apply(s.l(x))), others=batch, l=L, k=K)
case(56, "hooks that change values", nn.Sequential(linear(), nn.ReLU(), linear()), others=batch, dress=hooked)
case(57, "weight_norm", nn.Sequential(linear(), nn.ReLU(), linear()), others=batch,
     dress=lambda m: setattr(m, "0", nn.utils.parametrizations.weight_norm(m[0])))  # fmt: skip
case(58, "subclass of Linear", nn.Sequential(Scaled(8, 8), linear()), others=batch)
case(59, "Linear, BatchNorm, ReLU", nn.Sequential(linear(), norm(), nn.ReLU(), linear()), others=batch)
case(60, "one BatchNorm behind two layers", lambda s, x: s.n(s.l(x)) + s.n(s.k(x)), others=batch, l=L, k=K, n=norm())
case(61, "TransformerEncoderLayer", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQ, others=seqs)
case(62, "attention written out", attention, SEQ, others=seqs, qkv=linear(8, 24), out=L)
case(63, "LSTM", lambda s, x: s.k(s.r(x)[0]), SEQ, others=seqs, r=LSTM, k=K)
case(64, "Conv2d", nn.Sequential(CONV, nn.ReLU(), linear()), IMAGE, others=images)
case(65, "ConvTranspose2d", nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), linear(10)), IMAGE, others=images)
case(66, "Bilinear", lambda s, x: s.l(s.b(x, x)), others=batch, b=nn.Bilinear(8, 8, 8), l=L)
case(67, "`F.layer_norm(x, x.shape[-1:])`", lambda s, x: s.l(F.layer_norm(x, x.shape[-1:])), SEQ, others=seqs, l=L)
case(68, "where, topk, boolean mask", selecting, others=batch, l=L, k=K)
case(69, "1-D input", MLP, X[0], others=((X[0] / 2,),))
case(70, "a row of zeros in a weight", MLP, others=batch, holds=finite, dress=no_effect(zeros))
case(71, "an outlier weight", nn.Sequential(linear()), dress=no_effect(outlier),
     holds=lambda r, m: output_sqnr(runs(m, X)[:, :3], runs(r, X)[:, :3]) > MIN_SQNR)  # fmt: skip
case(72, "zeros as calibration", nn.Sequential(linear(), nn.ReLU(), linear()), torch.zeros(4, 8), holds=finite)
case(73, "a range that is all positive", nn.Sequential(linear(), nn.Sigmoid(), linear()), X.abs() + 5,
     others=((OTHER.abs() + 5,),))  # fmt: skip
case(74, "NaN in a calibration batch", MLP, NAN, others=((X,),), compares=False)
case(75, "a branch that no data reaches", lambda s, x, flag: s.l(x) if flag else s.k(x), X, True,
     others=((X, False),), l=L, k=linear(8, 8))  # fmt: skip
case(76, "one node returned twice, an unused input", lambda s, x, unused: (s.l(x), x, x), X, X,
     others=((OTHER, OTHER),), l=L)  # fmt: skip
case(77, "float output behind a linear", lambda s, x: s.l(x).relu(), others=batch, l=L,
     holds=lambda r, m: runs(r, X).dtype == torch.float32)  # fmt: skip
case(78, "buffer modified in forward", counting, others=batch, l=L, buf=torch.zeros(1),
     holds=lambda r, m: float(m.buf) == 0)  # fmt: skip
case(79, "`self.cache = y`", caching, others=batch, l=L, holds=leaves_no_tensor)
case(80, "print", printing, others=batch, l=L)
case(81, "try, no_grad, is_scripting", trying, others=batch, l=L)
case(82, "checkpoint", lambda s, x: checkpoint(s.l, x, use_reentrant=False), others=batch, l=L)
case(83, "scripted submodule", lambda s, x: s.k(s.s(x)), others=batch, k=K, dress=scripted)
case(84, "model in DataParallel", MLP, others=batch, dress=nn.DataParallel)
case(85, "model on the meta device", MLP, X.to("meta"), others=(), dress=lambda m: m.to("meta"),
     compares=False)  # fmt: skip
case(86, "converted twice", MLP, others=batch, twice=True)
case(87, "the user's model afterwards", nn.Sequential(linear(), norm(), nn.ReLU(inplace=True), linear()), others=batch)
case(88, "deepcopy, pickle, jit, export of the result", MLP, others=batch, holds=copies_are_equal)
case(89, "two threads", MLP, others=batch, holds=threads_agree)
case(90, "inference_mode, gradients, autocast", MLP, others=batch, holds=modes_agree)
case(91, "K = 70000", nn.Sequential(linear(70000, 2), linear(2, 2)), LONG)
case(92, "bias beyond int32", nn.Sequential(linear(), linear()), others=batch,
     dress=no_effect(lambda m: (m[0].weight.mul_(1e-7), m[0].bias.fill_(1e6))))  # fmt: skip
case(93, "multiplier above 1", lambda s, x: s.k(s.l(x).clamp(-1e-3, 1e-3)), others=batch, l=L, k=K,
     dress=no_effect(lambda m: m.l.weight.mul_(1e4)))  # fmt: skip
case(94, "scales below the smallest float", nn.Sequential(linear(bias=False)), X * 1e-5, compares=False, holds=finite,
     dress=no_effect(tiny))  # fmt: skip
case(95, "relu6 fused", nn.Sequential(linear(), nn.ReLU6(), linear()), 4 * X, others=((4 * OTHER,),))
case(96, "no bias", nn.Sequential(linear(bias=False), nn.ReLU(), linear(bias=False)), X + 3, others=((OTHER + 3,),))
case(97, "a weight of -128", nn.Sequential(linear()), others=batch, dress=no_effect(minus_128))
case(98, "a generator as calibration data", MLP, others=batch)
case(99, "other numbers of threads", MLP, others=batch, holds=thread_counts_agree)
case(100, "default dtype, matmul precision", MLP, others=batch, holds=settings_agree)
