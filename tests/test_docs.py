"""The pages: the README's passes, the cells that explain int8 inference, the table of cases of the page on tracing."""

import contextlib
import importlib.util
import io
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import passes
from fxq import numerics
from fxq.pipeline import Numbers

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "how-int8-inference-works.md"
CELL = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```\n", re.DOTALL)


def test_the_readme_tells_the_passes_as_they_are():
    rows = re.findall(
        r"^\| (`[a-z_`, ]+`) \| .* \| ([A-Z]+) \| (.+) \|$", (DOCS.parent / "README.md").read_text(), re.M
    )
    told = {name: row[1:] for row in rows for name in re.findall(r"\w+", row[0])}
    pipelines = passes.PREPARE, passes.PREPARE_QAT, passes.CONVERT, passes.IMPORT
    known = {step.name.replace("-", "_"): step for steps in pipelines for step in steps}
    assert told.keys() == known.keys()
    for steps in pipelines:
        names = [step.name.replace("-", "_") for step in steps]
        assert names == [name for name in told if name in names]
    short = {Numbers.ONE_STEP: "at most one step per node"}
    for name, step in known.items():
        stage, numbers = told[name]
        assert stage == step.gives.name, name
        assert numbers.startswith(short.get(step.numbers, step.numbers.value)), name


@pytest.fixture
def engine():
    """torch's engine for x86, which one cell shows; what the cell changes is put back."""
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no engine for x86")
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        yield
    torch.backends.quantized.engine = before


def test_every_cell_prints_what_the_page_shows(engine):
    text = PAGE.read_text()
    cells = CELL.findall(text)
    assert len(cells) == text.count("```python") > 15
    namespace = {}
    for code, shown in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), namespace)
        assert printed.getvalue() == shown, code


def test_the_wrong_formulas_fail_and_the_right_one_does_not():
    rows = re.findall(r"^(.+?) +([\d.]+)% wrong", PAGE.read_text(), re.MULTILINE)
    wrong = {name: float(share) for name, share in rows}
    assert wrong.pop("right: all four parts") == 0
    assert len(wrong) == 4
    assert min(wrong.values()) > 50


def test_equations_are_numbered_in_order():
    numbers = [int(number) for number in re.findall(r" \(H(\d+)\)$", PAGE.read_text(), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_the_plots_are_what_their_script_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("numerics_pictures", DOCS / "numerics_pictures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    for name in ("errors.svg", "range.svg"):
        assert (tmp_path / name).stat().st_size < 100_000
        assert (DOCS / "pictures" / name).exists()


def horner(x, coefficients):
    y = np.float32(coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def test_activations_from_the_page_alone():
    """The coefficients on the page are the code's: what they give has the very bits."""
    text = (DOCS / "numerics.md").read_text().partition("## Activations behind a product")[2]
    power, tanh_form, top, bottom = (
        [float(c) for c in found.split()] for found in re.findall(r"^ +[PQ]:((?:\s+-?\d[-.e\d]*)+)", text, re.M)
    )
    rows = [[float(v) for v in row.split()] for row in re.findall(r"^ +(\d+ +-?\S+ +-?\S+ +-?\S+)$", text, re.M)]
    assert [row[0] for row in rows] == list(range(16))
    x = np.random.default_rng(0).normal(0, 4, 10_000).astype(np.float32)

    def sigmoid(x):
        t = np.clip(x, np.float32(-87), np.float32(87)) * np.float32(-np.log2(np.e))
        return np.float32(1) / (np.float32(1) + horner(t - np.rint(t), power) * np.exp2(np.rint(t)))

    limit = np.float32(7.90531110763549805)
    c, a = np.clip(x, -limit, limit), np.minimum(abs(x), np.float32(3.8749998))
    square, slope, offset = np.array(rows, np.float32)[np.rint(4 * a).astype(int), 1:].T
    for name, y in {
        "sigmoid": sigmoid(x),
        "silu": x * sigmoid(x),
        "gelu_tanh": x * sigmoid(x * horner(x * x, tanh_form)),
        "tanh": c * (horner(c * c, top) / horner(c * c, bottom)),
        "gelu": np.maximum(x, 0) - ((square * a + slope) * a + offset),
    }.items():
        assert np.array_equal(y, numerics.ACTIVATIONS[name](x)), name


@pytest.fixture(scope="module")
def tracing_table():
    """The script that writes the table into docs/tracing.md."""
    for name in ("tracing_cases", "tracing_table"):
        spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules["tracing_table"]


def test_the_table_of_cases_says_what_fxq_does(tracing_table):
    """Numbers, titles, fxq's column and its sum; the other columns are torch's, and change when torch does."""
    page = tracing_table.PAGE.read_text()
    rows = [line.strip("| ").split(" | ") for line in page.partition("<!-- table:begin -->")[2].splitlines()[3:]]
    shown = {int(row[0]): (row[1], row[2]) for row in rows if row[0].isdigit()}
    with tracing_table.quietly():
        words = {case.number: (case.title, tracing_table.judge("fxq", case)) for case in tracing_table.CASES}
    assert shown == words
    assert list(words) == list(range(1, 101))
    counts = Counter(word for _, word in words.values())
    assert f"| **sum** | {'<br>'.join(f'{counts[w]} {w}' for w in tracing_table.WORDS if counts[w])} |" in page
    assert all(f"- **{word}**: {text}" in page for word, text in tracing_table.WORDS.items())


def test_the_errors_are_what_fxq_says(tracing_table):
    with tracing_table.quietly():
        assert all(message in tracing_table.PAGE.read_text() for message in tracing_table.errors())
