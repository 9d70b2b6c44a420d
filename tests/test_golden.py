import functools
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

import fxq
from fxq import golden_ops, numerics
from fxq.golden_model import GoldenModel
from fxq.graph import bind

ROOT = Path(__file__).parents[1]
MIN_MAX = fxq.Recipe(observer="min_max")


expanded = functools.lru_cache(1)(fxq.expand)


def to_numpy(value):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.numpy(), value)


def same_bits(a, b):
    """Equal in structure, dtype, shape and every bit; NaN has no particular bits."""
    if isinstance(a, np.ndarray):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        bits = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}") if a.ndim and a.size else a == b
        return bool(np.all(bits | ((a != a) & (b != b))))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def quantize(model, *inputs, recipe=MIN_MAX, **kwargs):
    return fxq.quantize(model.eval(), inputs, recipe=recipe, on_low_sqnr="ignore", **kwargs)


def agree(qmodel, golden, *args, **kwargs):
    """Whether output and every intermediate value have the bits that torch computes; returns the trace."""
    with torch.no_grad():
        expected = to_numpy(qmodel(*args, **kwargs))
    arrays, named = to_numpy((args, kwargs))
    assert same_bits(golden(*arrays, **named), expected)
    traced = golden.trace(*arrays, **named)
    flat = expanded(qmodel)
    interpreter = Interpreter(flat, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*bind(flat, args, kwargs))
    values = {node.name: value for node, value in interpreter.env.items()}
    count = 0
    for step in golden.program.steps:
        if isinstance(values[step.name], torch.Tensor):
            key = next(k for k in (f"{step.label}.y_q", f"{step.label}.y", step.label) if k in traced)
            assert same_bits(traced[key], values[step.name].numpy()), key
            count += 1
    assert count == sum(
        not key.endswith((".x_q", ".acc", ".acc+bias", ".act", ".scores", ".weights")) for key in traced
    )
    return traced


# Generated models: a list of moves on one tensor, each skipped where the shape does not allow it.


class Generated(nn.Module):
    def __init__(self, kinds, shape, widths, end):
        super().__init__()
        self.kinds, self.end = kinds, end
        self.widths = widths
        self.layers = nn.ModuleList()
        x = torch.zeros(shape)
        with torch.no_grad():
            for i, kind in enumerate(kinds):
                self.layers.append(nn.Identity())
                x = self.step(i, kind, x, build=True)

    def linear(self, i, x, width, build):
        if build:
            self.layers[i] = nn.Linear(x.shape[-1], width, bias=width % 3 != 0)
        return self.layers[i](x)

    def step(self, i, kind, x, build=False):
        width, last = self.widths[i % len(self.widths)], x.shape[-1]
        even = last % 2 == 0
        match kind:
            case "linear":
                return self.linear(i, x, width, build)
            case "linear_relu":
                return F.relu(self.linear(i, x, width, build))
            case "linear_relu6":
                return F.relu6(self.linear(i, x, width, build))
            case "linear_hardtanh":
                return F.hardtanh(self.linear(i, x, width, build), -0.5, 0.25)
            case "relu":
                return x.relu()
            case "clamp":
                return x.clamp(-0.3, 0.6)
            case "residual":
                return self.linear(i, x, last, build) + x
            case "residual_relu":
                return F.relu(x + self.linear(i, x, last, build))
            case "cat":
                return torch.cat([x, self.linear(i, x, width, build)], -1)
            case "halves" if even:
                a, b = x.chunk(2, -1)
                return torch.cat([b, a], dim=-1)
            case "split" if last > 2:
                a, b = x.split([1, last - 1], -1)
                return b
            case "narrow" if last > 2:
                return x.narrow(-1, 1, last - 2)
            case "slice" if last > 2:
                return x[..., 1:-1:2]
            case "unflatten" if even and x.dim() < 4:
                return x.unflatten(-1, (2, -1))
            case "flatten" if x.dim() > 2:
                return x.flatten(1)
            case "reshape" if x.dim() > 2:
                return x.reshape(x.shape[0], -1)
            case "transpose" if x.dim() > 2:
                return x.transpose(-1, -2)
            case "permute" if x.dim() == 4:
                return x.permute(0, 2, 3, 1)
            case "select" if x.dim() > 2:
                return x[:, -1]
            case "unbind" if x.dim() > 2:
                return x.unbind(1)[0]
            case "stack" if 1 < x.dim() < 4:
                return torch.stack([x, x], 1)
            case "unsqueeze" if 1 < x.dim() < 4:
                return x.unsqueeze(-2)
            case "squeeze" if x.dim() > 2:
                return x.squeeze(1)
            case "flip":
                return x.flip(-1)
            case "pool1d" if x.dim() == 3 and last > 2:
                return F.max_pool1d(x, 3, 2, 1, ceil_mode=True)
            case "pool2d" if x.dim() == 4 and last > 1 and x.shape[-2] > 1:
                return F.max_pool2d(x, 2, 1)
            case "glue":
                return 1.5 - x * 0.75
            case "glue2":
                return torch.maximum(x / 3, 0.25 - x.abs())
        return x

    def forward(self, x):
        first = x
        for i, kind in enumerate(self.kinds):
            x = self.step(i, kind, x)
            if i == 0:
                first = x
        return {"tensor": lambda: x, "tuple": lambda: (x, [first]), "dict": lambda: {"y": x, "n": x.shape[-1]}}[
            self.end
        ]()


KINDS = (
    *("linear", "linear_relu", "linear_relu6", "linear_hardtanh", "residual", "residual_relu", "cat"),
    *("relu", "clamp", "halves", "split", "narrow", "slice", "unflatten", "flatten", "reshape", "transpose", "permute"),
    *("select", "unbind", "stack", "unsqueeze", "squeeze", "flip", "pool1d", "pool2d", "glue", "glue2"),
)


@settings(max_examples=80)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=7),
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=2),
    rank_one=st.booleans(),
    width=st.integers(1, 9),
    widths=st.lists(st.sampled_from([1, 2, 3, 5, 8, 17, 66]), min_size=1, max_size=3),
    end=st.sampled_from(["tensor", "tuple", "dict"]),
    weight=st.sampled_from(["per_channel", "per_tensor"]),
    observer=st.sampled_from(["min_max", "moving_average", "percentile", "histogram"]),
    spread=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_generated_models_agree_in_every_bit(
    kinds, shape, rank_one, width, widths, end, weight, observer, spread, seed
):
    """80 models, 800 calls, several thousand rows; every intermediate value of each."""
    torch.manual_seed(seed)
    shape = (width,) if rank_one and not shape else (4, *shape, width)
    model = Generated(["linear", *kinds], shape, widths, end)
    x = spread * torch.randn(shape)
    q = quantize(model, x, recipe=fxq.Recipe(weight=weight, observer=observer))
    golden = fxq.golden(q)
    lead = 60 if len(shape) > 1 else shape[0]
    inputs = [x, spread * 2 * torch.randn(lead, *shape[1:])]
    inputs += [torch.full(shape, value) for value in (0.0, -0.0, 1e-42, 3e38, -3e38, torch.inf, -torch.inf)]
    inputs.append(torch.where(torch.rand(shape) < 0.5, torch.nan, x))
    for tensor in inputs:
        agree(q, golden, tensor)


def test_zoo_agrees_with_torch_in_every_bit(zoo):
    q = fxq.quantize(zoo.model, zoo.inputs, on_low_sqnr="ignore")
    golden = fxq.golden(q, islands="torch")
    if zoo.name == "in_place":
        with pytest.raises(fxq.GoldenError, match="works in place"):
            golden(*to_numpy(zoo.inputs))
    else:
        agree(q, golden, *zoo.inputs)
        agree(q, golden, *(-3 * torch.cat([x, x]) for x in zoo.inputs))


def test_keyword_arguments_and_defaults(keyword_model):
    model, args, kwargs = keyword_model
    q = fxq.quantize(model, args, example_kwargs=kwargs, on_low_sqnr="ignore")
    golden = fxq.golden(q)
    agree(q, golden, *args, **kwargs)
    with pytest.raises(fxq.InputError, match="missing a required argument"):
        golden(args[0].numpy())


def test_the_trace_of_a_linear_is_exact_integer_arithmetic(model_of):
    model = model_of(lambda self, x: self.fc2(F.relu(self.fc1(x))), fc1=nn.Linear(6, 9), fc2=nn.Linear(9, 3))
    q = quantize(model, torch.randn(32, 6))
    traced = fxq.golden(q).trace(torch.randn(5, 6).numpy())
    assert list(traced) == [
        "quantize",
        *("fc1.x_q", "fc1.acc", "fc1.acc+bias", "fc1.y_q"),
        *("fc2.x_q", "fc2.acc", "fc2.acc+bias", "fc2.y"),
    ]
    w = numerics.quantize_weight(w := model.fc1.weight.detach().numpy(), numerics.weight_scales(np.abs(w).max(1)))
    acc = [
        [sum(int(a) * int(b) for a, b in zip(row, column, strict=True)) for column in w] for row in traced["fc1.x_q"]
    ]
    assert np.array_equal(traced["fc1.acc"], acc)
    assert [traced[f"fc1.{part}"].dtype for part in ("x_q", "acc", "acc+bias", "y_q")] == ["u1", "i4", "i4", "u1"]
    assert np.array_equal(traced["fc2.x_q"], traced["fc1.y_q"])
    assert traced["fc2.y"].dtype == np.float32


def test_repeated_calls_and_ops_have_names_of_their_own(model_of):
    def forward(self, x):
        for _ in range(2):
            x = self.block(F.relu(self.block(x))) + self.block(x)
        return self.out(x)

    q = quantize(model_of(forward, block=nn.Linear(4, 4), out=nn.Linear(4, 2)), torch.randn(8, 4))
    traced = fxq.golden(q).trace(torch.randn(2, 4).numpy())
    assert sorted(key for key in traced if key.endswith("acc") or "qadd" in key) == [
        *("block#2.acc", "block#3.acc", "block#4.acc", "block#5.acc", "block#6.acc", "block.acc"),
        *("out.acc", "qadd", "qadd#2"),
    ]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_max_pools_match_torch(padding, ceil_mode, dtype):
    for size in range(4, 12):
        for kernel, stride, dilation in ((2, 2, 1), (3, 2, 1), (3, 1, 2), (2, 3, 3), (3, 4, 1)):
            x = torch.randint(0, 256, (2, 3, size, size + 2)).to(dtype)
            arguments = ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, ceil_mode)
            try:
                expected = torch.max_pool2d(x, *arguments)
            except RuntimeError:
                with pytest.raises(ValueError, match="smaller"):
                    golden_ops._max_pool(x.numpy(), *arguments)
                continue
            assert same_bits(golden_ops._max_pool(x.numpy(), *arguments), expected.numpy())


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 3e38])
PAIRS = SPECIAL.repeat(10), SPECIAL.repeat_interleave(10)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 31, 100])
@pytest.mark.parametrize(
    "glue",
    [
        *(torch.add, torch.sub, torch.mul, torch.div, lambda x, y: x.square()),
        *(lambda x, y: -x, lambda x, y: x.abs(), lambda x, y: x.relu(), lambda x, y: x / 3, lambda x, y: 3 / x),
        *(lambda x, y: x.clamp(0.0, 6.0), lambda x, y: x.clamp(-0.0), lambda x, y: x.clamp(max=0), lambda x, y: 2 - x),
    ],
)
def test_float_glue_has_torchs_bits_on_special_values(model_of, glue, size):
    x, y = (side[:size] for side in PAIRS)
    model = model_of(lambda self, x, y, z: (glue(x, y), self.l(z)), l=nn.Linear(2, 2))
    z = torch.ones(3, 2)
    q = quantize(model, torch.ones(size), torch.ones(size), z)
    assert same_bits(fxq.golden(q)(x.numpy(), y.numpy(), z.numpy()), to_numpy(q(x, y, z)))


MOVED = {
    "flatten": lambda x: x.flatten(1, 2),
    "unflatten": lambda x: x.unflatten(-1, (-1, 3)),
    "squeeze": lambda x: x.unsqueeze(1).squeeze().squeeze((0, 1)),
    "movedim": lambda x: torch.movedim(x, (0, 1), (2, 0)),
    "select": lambda x: x.select(2, -1),
    "narrow": lambda x: x.narrow(1, -2, 2),
    "flip": lambda x: torch.flip(x, (0, -1)),
    "tile": lambda x: torch.tile(x, (2, 1, 1, 2)),
    "tensor_split": lambda x: torch.cat(torch.tensor_split(x, 4, dim=-1)[:2], -1),
    "split": lambda x: torch.cat(x.split(5, -1)[::-1], -1),
    "chunk": lambda x: torch.cat(x.chunk(4, -1), 0) if x.shape[-1] % 4 == 0 else x.chunk(4, -1)[2],
    "unbind": lambda x: torch.stack(x.unbind(1), -1),
    "getitem": lambda x: x[:, None, ..., 1::2],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "T": lambda x: x[0, 0].T,
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "max_pool3d": lambda x: F.max_pool3d(x, (1, 2, 3), 2, (0, 1, 1)),
}


@pytest.mark.parametrize("move", MOVED)
def test_moves_match_torch(model_of, move):
    model = model_of(lambda self, x: (MOVED[move](self.l(x)), MOVED[move](x)), l=nn.Linear(6, 6))
    x = torch.randn(2, 4, 4, 6)
    agree(q := quantize(model, x), fxq.golden(q), x)


def test_a_guard_raises_the_same(model_of):
    def forward(self, x):
        return self.l(x) if x.shape[0] > 3 else self.l(x) * 2

    q = quantize(model_of(forward, l=nn.Linear(2, 2)), torch.randn(8, 2))
    golden = fxq.golden(q)
    agree(q, golden, torch.randn(5, 2))
    with pytest.raises(fxq.GuardError) as expected:
        q(torch.randn(2, 2))
    with pytest.raises(fxq.GuardError) as actual:
        golden(np.zeros((2, 2), np.float32))
    assert str(actual.value) == str(expected.value)


def test_a_guard_on_the_dtype_holds_and_breaks_alike(model_of):
    model = model_of(
        lambda self, i: self.l(self.e(i) if i.dtype == torch.int64 else i), e=nn.Embedding(9, 4), l=nn.Linear(4, 2)
    )
    q = quantize(model, torch.arange(9))
    golden = fxq.golden(q)
    agree(q, golden, torch.tensor([[8, 0], [3, 3]]))
    with pytest.raises(fxq.GuardError) as expected:
        q(torch.arange(9, dtype=torch.int32))
    with pytest.raises(fxq.GuardError) as actual:
        golden(np.arange(9, dtype=np.int32))
    assert str(actual.value) == str(expected.value)
    with pytest.raises(fxq.InputError, match="index out of range"):
        golden(np.array([9]))


def test_containers_among_the_inputs(model_of):
    model = model_of(lambda self, batch: self.l(batch["x"]) + self.l(batch["more"][0]), l=nn.Linear(3, 3))
    batch = {"x": torch.randn(4, 3), "more": [torch.randn(4, 3)]}
    q = fxq.quantize(model, (batch,), on_low_sqnr="ignore")
    golden = fxq.golden(q)
    agree(q, golden, batch)
    with pytest.raises(fxq.GuardError, match="batch"):
        golden({"x": batch["x"].numpy()})


Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    logits: torch.Tensor
    pair: Pair


def test_the_users_output_classes_are_kept_and_plain_after_load(model_of, tmp_path):
    model = model_of(lambda self, x: Result(self.l(x), Pair(x, self.l(x) * 2)), l=nn.Linear(3, 2))
    x = torch.randn(4, 3)
    q = quantize(model, x)
    expected, golden = q(x), fxq.golden(q)
    result = golden(x.numpy())
    assert type(result) is Result and type(result.pair) is Pair
    assert same_bits(result.logits, expected.logits.numpy())
    golden.save(tmp_path / "golden.npz")
    plain = GoldenModel.load(tmp_path / "golden.npz")(x.numpy())
    assert type(plain) is dict and type(plain["pair"]) is tuple
    assert same_bits(plain["pair"][1], expected.pair.second.numpy())


def test_float_islands_are_refused_by_name_and_taken_from_torch_on_demand(model_of, tmp_path):
    def forward(self, x):
        return self.out(self.group(self.fc(x)).softmax(-1))

    model = model_of(forward, fc=nn.Linear(6, 6), group=nn.GroupNorm(2, 6), out=nn.Linear(6, 2))
    x = torch.randn(8, 6)
    q = quantize(model, x)
    with pytest.raises(fxq.GoldenError, match=r"group  test_golden\.py:\d+\n.*softmax.*\n.*islands") as refused:
        fxq.golden(q)
    assert "fc" not in str(refused.value)
    golden = fxq.golden(q, islands="torch")
    assert len(golden.islands) == 2
    traced = agree(q, golden, x)
    assert {"fc.acc", "out.acc", *golden.islands} <= set(traced)
    with pytest.raises(fxq.GoldenError, match="cannot be saved"):
        golden.save(tmp_path / "golden.npz")


@pytest.mark.parametrize(
    "float_op",
    [
        lambda self, x: self.l(x).mean(-1),
        lambda self, x: self.l(x) @ x.T,
        lambda self, x: torch.add(self.l(x), x, alpha=2),
        lambda self, x: F.gelu(self.l(x)).exp(),
        lambda self, x: self.l(x).div(2, rounding_mode="floor"),
    ],
)
def test_what_numpy_rounds_otherwise_is_refused(model_of, float_op):
    q = quantize(model_of(float_op, l=nn.Linear(3, 3)), torch.randn(3, 3))
    with pytest.raises(fxq.GoldenError, match="NumPy cannot promise"):
        fxq.golden(q)


def test_an_island_may_work_in_place_where_only_islands_read_that_memory(model_of):
    model = model_of(lambda self, x: self.l(x) + torch.zeros_like(x).masked_fill_(x > 0, 1.0), l=nn.Linear(3, 3))
    q = quantize(model, x := torch.randn(3, 3))
    agree(q, fxq.golden(q, islands="torch"), x)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid()])
def test_activations(activation):
    layers = nn.Linear(4, 9), activation, nn.Linear(9, 7), activation
    q = quantize(nn.Sequential(*layers), x := torch.randn(16, 4))
    golden = fxq.golden(q, islands="torch")
    assert golden.islands == ()
    agree(q, golden, 4 * x)
    agree(q, golden, torch.full((2, 4), torch.inf))


def test_a_linear_kept_float_is_an_island():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    q = quantize(model, x := torch.randn(3, 3), recipe=fxq.Recipe(modules={"1": fxq.FLOAT}))
    with pytest.raises(fxq.GoldenError, match=r"\n  1\.linear"):
        fxq.golden(q)
    agree(q, fxq.golden(q, islands="torch"), x)


def test_an_island_reads_its_inputs_in_the_order_that_they_have_in_memory():
    """A product of torch's rounds by it."""
    q = quantize(nn.Linear(64, 8), x := torch.randn(48, 64), recipe=fxq.Recipe("float"))
    golden = fxq.golden(q, islands="torch")
    agree(q, golden, x)
    agree(q, golden, torch.randn(64, 48).t())


def test_wrong_inputs_are_named():
    golden = fxq.golden(quantize(nn.Linear(3, 2), torch.randn(4, 3)))
    for wrong, message in (
        (torch.randn(4, 3), r"`input` is a Tensor; a golden model takes NumPy arrays"),
        (np.zeros((4, 3)), r"`input` is float64; convert it with \.astype\(np\.float32\)"),
        (np.zeros((4, 3), np.int64), r"int64"),
        (np.zeros((4, 5), np.float32), r"5 features"),
    ):
        with pytest.raises(fxq.InputError, match=message):
            golden(wrong)
    with pytest.raises(fxq.InputError, match="too many positional"):
        golden(1, 2)
    with pytest.raises(fxq.InputError, match=r"takes what fxq\.quantize returns, not a Linear"):
        fxq.golden(nn.Linear(2, 2))


def test_empty_batches_and_unusual_memory():
    q = quantize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 3))
    golden = fxq.golden(q)
    agree(q, golden, torch.randn(0, 3))
    agree(q, golden, torch.randn(3, 7).T)
    agree(q, golden, torch.randn(5, 6)[:, ::2])


def test_a_bias_that_stays_float_and_an_all_zero_row():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[:] = torch.tensor([1e30, 0.5, -1.0])
    agree(q := quantize(layer, x := torch.randn(4, 3)), fxq.golden(q), x)


def test_later_changes_of_the_torch_model_do_not_reach_it():
    q = quantize(nn.Linear(3, 3), x := torch.randn(4, 3))
    golden, expected = fxq.golden(q), q(x).numpy()
    for buffer in q.buffers():
        buffer.zero_()
    assert same_bits(golden(x.numpy()), expected)


def test_a_model_that_was_saved_loaded_or_copied_gives_the_same_program(tmp_path):
    q = quantize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x := torch.randn(4, 3))
    fxq.save(q, tmp_path / "q.fxq")
    assert list(agree(q, fxq.golden(fxq.load(tmp_path / "q.fxq")), x)) == list(fxq.golden(q).trace(x.numpy()))


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # any `import torch` now raises ImportError
import numpy as np
from fxq.golden_model import GoldenModel
golden = GoldenModel.load(sys.argv[1])
np.savez(sys.argv[3], y=golden(np.load(sys.argv[2])), **golden.trace(np.load(sys.argv[2])))
"""


def test_a_saved_program_runs_where_torch_cannot_be_imported(model_of, tmp_path):
    def forward(self, x):
        y = F.relu(self.a(x.reshape(-1, 6))).view(x.shape[0], -1, 6)
        y = F.max_pool1d(torch.cat([y + x, x], 1), 2)
        return self.b(y[:, ::2]) * 0.5

    q = quantize(model_of(forward, a=nn.Linear(6, 6), b=nn.Linear(3, 5)), x := torch.randn(4, 3, 6))
    golden = fxq.golden(q)
    files = [tmp_path / name for name in ("golden", "x.npy", "out.npz")]
    golden.save(files[0])
    np.save(files[1], x.numpy())
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, files)], cwd=ROOT, check=True)
    with np.load(files[2]) as out:
        assert same_bits(out["y"], q(x).numpy())
        traced = golden.trace(x.numpy())
        assert all(same_bits(out[key], array) for key, array in traced.items())


def test_files_that_are_not_golden_models(tmp_path):
    with pytest.raises(fxq.FileError, match="no such file"):
        GoldenModel.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    fxq.golden(quantize(nn.Linear(3, 2), torch.randn(4, 3))).save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-200])
    (tmp_path / "newer").write_bytes((tmp_path / "whole").read_bytes().replace(b'"version": 1', b'"version": 9'))
    for name in ("text", "other.npz", "cut", "newer"):
        with pytest.raises(fxq.FileError, match=r"is damaged or not a golden model|version 9"):
            GoldenModel.load(tmp_path / name)


def test_ops_of_ones_own(model_of, tmp_path):
    q = quantize(model_of(lambda self, x: self.l(x).sum(-1), l=nn.Linear(3, 3)), x := torch.ones(4, 3))

    def total(input, dim):
        return ((input[..., 0] + input[..., 1]) + input[..., 2]).astype(np.float32)

    golden = fxq.golden(q, ops={"sum": total})
    np.testing.assert_allclose(golden(x.numpy()), q(x).numpy(), rtol=1e-6)
    golden.save(tmp_path / "own")
    with pytest.raises(fxq.GoldenError, match="calls sum"):
        GoldenModel.load(tmp_path / "own")
    assert same_bits(GoldenModel.load(tmp_path / "own", ops={"sum": total})(x.numpy()), golden(x.numpy()))
