"""Dumps for hardware: read back without fxq, recomputed from the files alone, compiled by a C compiler."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import golden_files, golden_ops, numerics
from fxq.recipe import Recipe

X = torch.randn(16, 8)


@pytest.fixture(scope="module")
def golden():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5), nn.ReLU6(), nn.Linear(5, 3)).eval()
    return fxq.golden(fxq.quantize(model, X, recipe=Recipe(requant="fixed"), on_low_sqnr="ignore"))


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return golden.dump(tmp_path_factory.mktemp("dump") / "files", X.numpy())


def layer(manifest, name):
    (found,) = [entry for entry in manifest["layers"] if entry["name"] == name]
    return found


def test_a_layer_from_the_files_alone(folder):
    manifest, arrays = json.loads((folder / "manifest.json").read_text()), np.load(folder / "arrays.npz")
    entry = layer(manifest, "2")
    assert entry["op"] == "fxq.qlinear_fixed"
    assert entry["formula"].startswith("q_y = clamp(scale(acc + bias")
    operands = entry["operands"]
    x, w, bias, multiplier, shift = (
        arrays[operands[name]["array"]].tolist() for name in ("x", "weight", "bias", "multiplier", "shift")
    )
    assert operands["rounding"] == "single"
    expected = arrays[entry["result"]["array"]].tolist()
    assert np.shape(w) == (5, 12)
    for row, result in zip(x, expected, strict=True):
        for n in range(5):
            v = sum(a * c for a, c in zip(row, w[n], strict=True)) + bias[n]
            q = ((v * multiplier[n] + (1 << shift[n] >> 1)) >> shift[n]) + operands["zero_point"]
            assert min(max(q, operands["low"]), operands["high"]) == result[n]


def test_the_order_in_memory_is_no_part_of_a_formula():
    assert golden_files.formula("fxq.quantize_channels_last") == golden_files.formula("fxq.quantize") != ""


def test_every_op_has_an_equation():
    ops = [op for op in golden_ops.OPS if op.startswith("fxq.")]
    assert [op for op in ops if not golden_files.formula(op)] == []
    text = "".join(golden_files._equations(ops))
    assert all(f"`{op.removeprefix('fxq.').removesuffix('_channels_last')}(" in text for op in ops)


def test_every_intermediate_is_there(folder, golden):
    arrays = np.load(folder / "arrays.npz")
    for name, array in golden.trace(X.numpy()).items():
        assert np.array_equal(arrays[name], array), name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["arrays"]) == sorted(arrays.files)
    for name, entry in manifest["arrays"].items():
        assert (entry["dtype"], tuple(entry["shape"])) == (str(arrays[name].dtype), arrays[name].shape)
    assert np.array_equal(arrays[manifest["outputs"]["array"]], golden(X.numpy()))
    assert np.array_equal(arrays[manifest["inputs"]["input"]["array"]], X.numpy())


def test_hex_files_hold_the_bits(folder):
    manifest, arrays = json.loads((folder / "manifest.json").read_text()), np.load(folder / "arrays.npz")
    for name, entry in manifest["arrays"].items():
        title, *words = (folder / entry["hex"]).read_text().splitlines()
        assert title == f"// {name}: {entry['dtype']} {entry['shape']}, row major"
        array = arrays[name]
        content = b"".join(int(word, 16).to_bytes(array.itemsize, "little") for word in words)
        assert np.array_equal(np.frombuffer(content, array.dtype).reshape(array.shape), array)
        assert {len(word) for word in words} == {2 * array.itemsize}


PROGRAM = """
#include <stdio.h>
#include "golden.h"
int main(void) {
  int wrong = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 5; ++n) {
      int32_t v = fxq_2_bias[n];
      for (int k = 0; k < 12; ++k) v += fxq_2_x_q[m * 12 + k] * fxq_2_weight[n * 12 + k];
      int64_t q = ((int64_t)v * fxq_2_multiplier[n] + (((int64_t)1 << fxq_2_shift[n]) >> 1)) >> fxq_2_shift[n];
      q += FXQ_2_ZERO_POINT;
      q = q < FXQ_2_LOW ? FXQ_2_LOW : q > FXQ_2_HIGH ? FXQ_2_HIGH : q;
      wrong += q != fxq_2_y_q[m * 5 + n];
    }
  printf("%d of 80 wrong, %.9g\\n", wrong, fxq_input_input[3]);
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_c_program_computes_a_layer(folder, tmp_path):
    (tmp_path / "main.c").write_text(PROGRAM)
    command = ["cc", "-std=c99", "-Wall", "-Werror", "-Wno-unused-variable", "-Wno-unused-const-variable"]
    subprocess.run([*command, f"-I{folder}", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=True)
    wrong, value = done.stdout.split(", ")
    assert wrong == "0 of 80 wrong"
    assert np.float32(value) == X[0, 3].item()


def test_the_same_bytes_again(folder, golden, tmp_path):
    again = golden.dump(tmp_path / "again", (X.numpy(),))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {"README.md", "manifest.json", "arrays.npz", "golden.h"} <= {str(name) for name in files}
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_float_multipliers_with_their_bits(model_of, tmp_path):
    model = model_of(lambda s, x: s.c(F.relu(s.a(x)) + s.b(F.relu(s.a(x)))), **{n: nn.Linear(8, 8) for n in "abc"})
    golden = fxq.golden(fxq.quantize(model, X))
    folder = golden.dump(tmp_path / "files", {"x": X.numpy()})
    manifest, arrays = json.loads((folder / "manifest.json").read_text()), np.load(folder / "arrays.npz")
    (add,) = [entry for entry in manifest["layers"] if entry["op"] == "fxq.qadd"]
    m_a = add["operands"]["m_a"]
    assert np.frombuffer(bytes.fromhex(m_a["float32"]), ">f4")[0] == float(m_a["value"])
    assert arrays[layer(manifest, "a#2")["operands"]["multiplier"]["array"]].dtype == np.float32
    assert layer(manifest, "a#2")["operands"]["x"] == layer(manifest, "a")["operands"]["x"]


def test_every_model_of_the_zoo_can_be_dumped(zoo, tmp_path):
    if zoo.name == "in_place":
        pytest.skip("a golden model works out of place")
    qmodel = fxq.quantize(zoo.model, zoo.inputs, recipe=Recipe(balance=False), on_low_sqnr="ignore")
    golden = fxq.golden(qmodel, islands="torch")
    folder = golden.dump(tmp_path / "files", tuple(x.numpy() for x in zoo.inputs))
    arrays = np.load(folder / "arrays.npz")
    traced = golden.trace(*(x.numpy() for x in zoo.inputs))
    assert all(np.array_equal(arrays[name], array, equal_nan=True) for name, array in traced.items())


def test_folders_that_cannot_be_written(golden, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, message in (
        (tmp_path / "full", "is not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "no" / "files", "there is no folder"),
    ):
        with pytest.raises(fxq.FileError, match=message):
            golden.dump(path, X.numpy())
    (tmp_path / "empty").mkdir()
    assert golden.dump(tmp_path / "empty", X.numpy()) == tmp_path / "empty"

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(golden_files, "_header", fail)
    with pytest.raises(fxq.FileError, match="no space left"):
        golden.dump(tmp_path / "half", X.numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    with pytest.raises(fxq.InputError):
        golden.dump(tmp_path / "half", X.numpy().astype(np.float64))


def test_names_for_c():
    names = golden_files._identifiers(dict.fromkeys(["a.acc", "a.acc+bias", "a_acc", "A.ACC", "0.x", "b#2.y[1]"]))
    assert list(names.values()) == ["a_acc", "a_acc_plus_bias", "a_acc_2", "A_ACC_3", "0_x", "b_2_y_1_"]
    assert max(map(len, golden_files._identifiers(["a" * 400, "a" * 401]).values())) == 202  # files have 255


def test_c_literals_are_exact():
    values = 0.1, float("nan"), float("-inf"), True, -(2**31), -(2**63), -5
    assert [golden_files._number(v) for v in values] == [
        "0.1", "NAN", "(-INFINITY)", "1", "(-2147483647 - 1)", "(-9223372036854775807 - 1)", "(-5)",
    ]  # fmt: skip
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    floats = bits.view(np.float32)[np.isfinite(bits.view(np.float32))]
    again = [np.float32(golden_files._float32(v).removesuffix("f")) for v in floats.tolist()]
    assert np.array_equal(np.array(again), floats)
    assert [golden_files._float32(v) for v in (1.0, float("inf"))] == ["1.00000000e+00f", "INFINITY"]


COMPILERS = [
    *(("cc", f"-std={standard}", "c") for standard in ("c99", "gnu17")),
    *(("c++", f"-std={standard}", "cpp") for standard in ("c++11", "gnu++17")),
]


class Awkward(nn.Module):
    """Names that C has for other things, that end a comment, or that two operands share once their points are gone."""

    def __init__(self):
        super().__init__()
        for name in ("int", "gamma", "*/ /*", "\u00fc", "L", "l", "x" * 300):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.children():
            x = torch.relu(layer(x))
        heads = x.reshape(-1, 2, 4).select(1, 0)
        return {"heads": [heads], "sum": x.permute(1, 0)}


@pytest.mark.parametrize(("compiler", "standard", "suffix"), COMPILERS)
def test_a_header_of_any_names_compiles(compiler, standard, suffix, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    torch.manual_seed(0)
    golden = fxq.golden(fxq.quantize(Awkward().eval(), X, on_low_sqnr="ignore"))
    folder = golden.dump(tmp_path / "files", X.numpy())
    manifest, arrays = json.loads((folder / "manifest.json").read_text()), np.load(folder / "arrays.npz")
    (heads,) = manifest["outputs"]["heads"]
    assert np.array_equal(arrays[heads["array"]], golden(X.numpy())["heads"][0])
    assert layer(manifest, "permute")["operands"]["dims"] == [1, 0]
    names = [entry["c"] for entry in manifest["arrays"].values()]
    writes = "\n".join(f"fwrite({name}, sizeof *{name}, sizeof {name} / sizeof *{name}, stdout);" for name in names)
    program = f'#include <stdio.h>\n#include <stdlib.h>\n#include "files/golden.h"\nint main(void) {{ {writes} }}\n'
    (tmp_path / f"main.{suffix}").write_text(program)
    command = [compiler, standard, "-Wall", "-Wextra", "-pedantic", "-Werror", f"main.{suffix}", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b"".join(arrays[name].tobytes() for name in manifest["arrays"])
    for entry in manifest["arrays"].values():
        title, *words = (folder / entry["hex"]).read_text().splitlines()
        assert title.startswith("// ")
        assert len(words) == np.prod(entry["shape"])


def test_the_equations_of_all_ops_are_in_the_readme(tmp_path):
    """With what their equations name, and a convolution's window in numbers: nothing is left to guess."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4), nn.GELU()
    model, x = nn.Sequential(*layers, nn.Linear(4, 4)).eval(), torch.randn(8, 2, 4, 4)
    golden = fxq.golden(fxq.quantize(model, x, recipe=Recipe(judge_costs=False), on_low_sqnr="ignore"))
    folder = golden.dump(tmp_path / "files", x.numpy())
    manifest, arrays = json.loads((folder / "manifest.json").read_text()), np.load(folder / "arrays.npz")
    readme = (folder / "README.md").read_text()
    for entry in manifest["layers"]:
        if entry["op"].startswith("fxq."):
            assert entry["formula"] in readme
    for name in ("gelu(x)", "qconv_float(", "quantize(", "fxq.numerics.activations"):
        assert name in readme
    assert layer(manifest, "0")["operands"]["window"] == {
        "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1,
        "output_padding": [0, 0],
    }  # fmt: skip
    assert "#define FXQ_0_WINDOW_PADDING {1, 1, 1, 1}" in (folder / "golden.h").read_text()
    for name in ("0", "4"):
        operands = layer(manifest, name)["operands"]
        act = arrays[f"{name}.act"]
        quantized = numerics.quantize(act, float(operands["scale"]["value"]), operands["zero_point"])
        assert np.array_equal(quantized, arrays[f"{name}.y_q"])


def test_a_constant_that_only_torch_reads_is_named(tmp_path):
    """A float island's weight is no array of the program; its files were refused with a KeyError."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 3, 2, 2)
    qmodel = fxq.quantize(model, x, recipe=Recipe("w8a8", judge_costs=False, modules={"0": fxq.FLOAT}))
    folder = fxq.golden(qmodel, islands="torch").dump(tmp_path / "files", x[:1].numpy())
    layers = json.loads((folder / "manifest.json").read_text())["layers"]
    island = next(layer for layer in layers if layer["op"] == "torch")
    assert "0.weight" in island["operands"].values()
