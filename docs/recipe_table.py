"""Runs every recipe through everything that fxq does with a model, and writes the table of docs/recipes.md.

    make recipe-table

Three small models stand for rows, images and tokens. A cell is what came of all three: `yes`, or the error by name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq import kernels

PAGE = Path(__file__).parent / "recipes.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"


class Rows(nn.Module):
    """Linears: activations behind them, a weight that two of them share, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.Linear(16, 24)
        self.c.weight = self.a.weight
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        return self.head(F.relu6(self.c(y)))  # type: ignore[no-any-return]


class Images(nn.Module):
    """Convolutions with a norm, one of them in groups, pooling of both kinds, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 16, 1)
        self.pool, self.average, self.head = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        y = self.pool(F.relu(self.pointwise(self.grouped(y))))
        return self.head(torch.flatten(self.average(y), 1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Attention with a norm before it and a residual around it, and a feed-forward net."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (Rows, (32, 16)),
    "images": (Images, (12, 3, 16, 16)),
    "tokens": (Tokens, (12, 6, 16)),
}


@dataclass(frozen=True)
class Subject:
    """A float model, what a recipe made of it, inputs, and the folder of the steps it was made in."""

    model: nn.Module
    qmodel: fxq.QuantizedModule
    x: Tensor
    dump: Path


Make = Callable[[nn.Module, Tensor, Path], fxq.QuantizedModule]


def _quantize(recipe: str, **options: Any) -> Make:
    def make(model: nn.Module, x: Tensor, folder: Path) -> fxq.QuantizedModule:
        """Whatever it costs on this machine."""
        own = fxq.Recipe(recipe, judge_costs=False, **options)  # type: ignore[arg-type]
        return fxq.quantize(model, x, recipe=own, dump=folder, on_low_sqnr="ignore")

    return make


def _trained(model: nn.Module, x: Tensor, folder: Path) -> fxq.QuantizedModule:
    """Three steps towards what the float model says."""
    qat = fxq.prepare_qat(model, x, dump=folder)
    optimizer = torch.optim.SGD(qat.parameters(), 1e-3)
    with torch.no_grad():
        wanted = model(x)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(qat(x), wanted).backward()
        optimizer.step()
    return fxq.convert(qat)


def _imported(exact: Any) -> Make:
    def make(model: nn.Module, x: Tensor, folder: Path) -> fxq.QuantizedModule:
        """By torch's FX workflow, by `quantize_dynamic` what that has no integers for."""
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        if isinstance(model, Tokens):
            theirs = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        else:
            prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("fbgemm"), (x,))
            prepared(x)
            theirs = convert_fx(prepared)
        return fxq.from_torch(theirs, x, exact=exact, dump=folder)

    return make


RECIPES: dict[str, Make] = {
    "w8a8": _quantize("w8a8"),
    "w8a8-dynamic": _quantize("w8a8-dynamic"),
    "w8a32": _quantize("w8a32"),
    "w8a16": _quantize("w8a16"),
    "fixed, single": _quantize("w8a8", requant="fixed"),
    "fixed, tflite": _quantize("w8a8", requant="fixed", rounding="tflite"),
    "QAT": _trained,
    "from_torch": _imported(None),
    "from_torch, exact": _imported("fbgemm"),
}


def subject(recipe: str, kind: str, folder: Path) -> Subject:
    """The model of a kind, in the dtype of the recipe, and what the recipe makes of it."""
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    dtype = torch.bfloat16 if recipe == "w8a16" else torch.float32
    model, x = make().eval().to(dtype), torch.randn(shape, dtype=dtype)
    kernels.info()  # their compiler is found by the PATH
    path, os.environ["PATH"] = os.environ["PATH"], ""  # without dot, the pictures of passes are texts
    try:
        return Subject(model, RECIPES[recipe](model, x, folder / "dump"), x, folder / "dump")
    finally:
        os.environ["PATH"] = path


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def _has_torch_products(s: Subject) -> bool:
    """Whether float products are left to torch, whose bits depend on the batch, on memory and on threads."""
    return any(d.form == "float" and d.macs for d in s.qmodel.report.decisions)


def _agree(s: Subject, a: Tensor, b: Tensor) -> None:
    """The same bits, or where torch has products left, the same numbers."""
    assert _same(a, b) or (_has_torch_products(s) and torch.allclose(a, b, rtol=1e-2, atol=1e-2)), (a - b).abs().max()


def _how(s: Subject) -> str:
    return "≈" if _has_torch_products(s) else "yes"


def report(s: Subject, folder: Path) -> None:
    """Each operation has a form, each float one a reason; what was asked for stands in it."""
    found = fxq.report(s.qmodel)
    assert found.decisions and all(d.reason is not None for d in found.decisions if d.form == "float")
    assert "multiply-accumulates in int8" in str(found)
    assert any(d.form in ("int8", "weight") for d in found.decisions)


def draw(s: Subject, folder: Path) -> None:
    """The picture names the integer ops."""
    assert "digraph" in fxq.draw(s.qmodel, folder / "model.dot").read_text()


def steps(s: Subject, folder: Path) -> None:
    """A text, and a difference, of every pass that changed something."""
    texts = {path.name for path in s.dump.iterdir()}
    assert any("lower" in name for name in texts) and len(texts) > 5


def compare(s: Subject, folder: Path) -> None:
    """Noise per layer and of the output."""
    found = fxq.compare(s.model, s.qmodel, s.x)
    assert found.output > 15 and found.layers


def profile(s: Subject, folder: Path) -> None:
    """Microseconds of each operation."""
    assert fxq.profile(s.qmodel, s.x).timings


def golden(s: Subject, folder: Path) -> None:
    """NumPy's bits, and its files; float islands are torch's."""
    program = fxq.golden(s.qmodel, islands="torch")
    x = s.x.numpy()
    assert _same(torch.from_numpy(np.asarray(program(x))), s.qmodel(s.x))
    program.dump(folder / "files", x[:2])
    assert (folder / "files" / "manifest.json").exists()


def save(s: Subject, folder: Path) -> None:
    """`fxq.save` and `fxq.load`, and pickle."""
    fxq.save(s.qmodel, folder / "model.fxq")
    assert _same(fxq.load(folder / "model.fxq")(s.x), s.qmodel(s.x))
    assert _same(pickle.loads(pickle.dumps(s.qmodel))(s.x), s.qmodel(s.x))


def state_dict(s: Subject, folder: Path) -> None:
    """Through a file into a copy whose numbers were lost."""
    torch.save(s.qmodel.state_dict(), folder / "state.pt")
    other = copy.deepcopy(s.qmodel)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(folder / "state.pt"))
    assert _same(other(s.x), s.qmodel(s.x))


def deepcopy(s: Subject, folder: Path) -> None:
    """A copy computes the same and shares nothing."""
    other, wanted = copy.deepcopy(s.qmodel), s.qmodel(s.x)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert _same(s.qmodel(s.x), wanted)
    assert str(other.report) == str(s.qmodel.report)


def batches(s: Subject, folder: Path) -> str:
    """Other batch sizes, 0 and 1 among them, give the same rows; a NaN or a giant stays in its own."""
    wanted = s.qmodel(s.x)
    if "qlinear_dynamic_engine" in s.qmodel.code:
        assert s.qmodel(s.x[:3]).shape == wanted[:3].shape
        return "one range for all rows, as torch has it"
    for size in (0, 1, 3):
        _agree(s, s.qmodel(s.x[:size]), wanted[:size])
    mates = s.x.clone()
    mates[1], mates[2] = torch.nan, mates[2] * 1000
    rest = [0, *range(3, len(mates))]
    _agree(s, s.qmodel(mates)[rest], wanted[rest])
    return _how(s)


def memory(s: Subject, folder: Path) -> str:
    """Inputs that are not contiguous, and inference mode."""
    strided = torch.stack([s.x, torch.full_like(s.x, torch.nan)], -1)[..., 0]
    assert not strided.is_contiguous()
    wanted = s.qmodel(s.x)
    _agree(s, s.qmodel(strided), wanted)
    if s.x.dim() == 4:
        _agree(s, s.qmodel(s.x.contiguous(memory_format=torch.channels_last)), wanted)
    with torch.inference_mode():
        _agree(s, s.qmodel(s.x), wanted)
    return _how(s)


def isas(s: Subject, folder: Path) -> str:
    """The same bits on every instruction set, and on two threads."""
    wanted = s.qmodel(s.x)
    for name in kernels.info().available:
        with kernels.use_isa(name):
            _agree(s, s.qmodel(s.x), wanted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _agree(s, s.qmodel(s.x), wanted)
    finally:
        torch.set_num_threads(threads)
    return _how(s)


def compiled(s: Subject, folder: Path) -> None:
    """`torch.compile` captures the whole model."""
    torch._dynamo.reset()
    assert _same(torch.compile(s.qmodel, backend="eager", fullgraph=True)(s.x), s.qmodel(s.x))


def refuses(s: Subject, folder: Path) -> None:
    """Activations of another dtype, and gradients, in words that name the way out."""
    other = torch.float32 if s.x.dtype == torch.bfloat16 else torch.bfloat16
    told = _refusal(lambda: s.qmodel(s.x.to(other)))
    assert f"input 'x' has dtype {other}" in told
    assert "prepare_qat" in _refusal(lambda: s.qmodel(s.x.clone().requires_grad_()).sum().backward())


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except fxq.InputError as error:
        return str(error)
    return ""


FEATURES: dict[str, Callable[[Subject, Path], str | None]] = {
    "report: a reason for each float operation": report,
    "picture": draw,
    "dump: text of each pass": steps,
    "compare": compare,
    "profile": profile,
    "golden: NumPy's bits, files for hardware": golden,
    "save, load, pickle": save,
    "state_dict through a file": state_dict,
    "deepcopy": deepcopy,
    "other batches; rows keep to themselves": batches,
    "any memory order, inference mode": memory,
    "the same bits on each instruction set and two threads": isas,
    "torch.compile, one graph": compiled,
    "other dtypes and gradients are refused": refuses,
}


def column(recipe: str) -> dict[str, str]:
    """What came of each feature."""
    words: dict[str, dict[str, list[str]]] = {feature: {} for feature in FEATURES}
    with quietly(), tempfile.TemporaryDirectory() as folder:
        for kind in MODELS:
            own = Path(folder) / kind
            own.mkdir()
            try:
                made = subject(recipe, kind, own)
            except fxq.FxqError as error:
                for feature in FEATURES:
                    words[feature].setdefault(_told(error), []).append(kind)
                continue
            for feature, run in FEATURES.items():
                try:
                    word = run(made, own) or "yes"
                except fxq.FxqError as error:
                    word = _told(error)
                words[feature].setdefault(word, []).append(kind)
    return {
        feature: next(iter(found)) if len(found) == 1 else "; ".join(f"{', '.join(k)}: {w}" for w, k in found.items())
        for feature, found in words.items()
    }


def _told(error: fxq.FxqError) -> str:
    return f"`{type(error).__name__}`"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of torch.ao and the messages of low accuracy."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def table(columns: dict[str, dict[str, str]]) -> str:
    """Features by recipes, as Markdown."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for feature in FEATURES:
        lines.append(f"| {feature} | " + " | ".join(own[feature] for own in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    torch.set_num_threads(1)
    page = PAGE.read_text()
    text = table({recipe: column(recipe) for recipe in RECIPES})
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :])
    print(text)


if __name__ == "__main__":
    main()
