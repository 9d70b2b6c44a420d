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
from fxq import golden_files
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
      int32_t v = _2_bias[n];
      for (int k = 0; k < 12; ++k) v += _2_x_q[m * 12 + k] * _2_weight[n * 12 + k];
      int64_t q = ((int64_t)v * _2_multiplier[n] + (((int64_t)1 << _2_shift[n]) >> 1)) >> _2_shift[n];
      q += _2_ZERO_POINT;
      q = q < _2_LOW ? _2_LOW : q > _2_HIGH ? _2_HIGH : q;
      wrong += q != _2_y_q[m * 5 + n];
    }
  printf("%d of 80 wrong, %.9g\\n", wrong, input_input[3]);
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
    assert list(names.values()) == ["a_acc", "a_acc_plus_bias", "a_acc_2", "A_ACC_3", "_0_x", "b_2_y_1_"]


def test_c_literals_are_exact():
    assert golden_files._number(0.1) == "0x1.999999999999ap-4"
    assert [golden_files._number(v) for v in (float("nan"), float("-inf"), True, -(2**31), -(2**63), -5)] == [
        "NAN", "-INFINITY", "1", "(-2147483647 - 1)", "(-9223372036854775807 - 1)", "-5",
    ]  # fmt: skip


def test_a_constant_that_only_torch_reads_is_named(tmp_path):
    """A float island's weight is no array of the program; its files were refused with a KeyError."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 3, 2, 2)
    qmodel = fxq.quantize(model, x, recipe=Recipe("w8a8", judge_costs=False, modules={"0": fxq.FLOAT}))
    folder = fxq.golden(qmodel, islands="torch").dump(tmp_path / "files", x[:1].numpy())
    layers = json.loads((folder / "manifest.json").read_text())["layers"]
    island = next(layer for layer in layers if layer["op"] == "torch")
    assert "0.weight" in island["operands"].values()
