"""Runs the hundred cases of docs/tracing.md through fxq, torch.fx, torch.ao's FX quantization and torch.export.

make tracing-table        # writes the table and the errors into docs/tracing.md
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from tracing_cases import CASES, Case, X, fresh, is_right, runs

import fxq

PAGE = Path(__file__).parent / "tracing.md"
WORDS = {
    "ok": "the right result, on the examples and on other inputs",
    "REF": "refused with an error of fxq's that names the line or the layer, and a remedy",
    "ERR": "raised",
    "BAD": "ran with a wrong or useless (below 15 dB) result, or changed the user's model",
    "FLT": "ran, and quantized nothing",
    "SHP": "works for the shape or value of the example; another raises (fxq: a `GuardError` that names the line)",
}


def by_fxq(model: nn.Module, case: Case) -> nn.Module:
    """fxq.quantize, calibrated on the example by a generator."""
    data = (call for call in [(*case.inputs,)])
    recipe = fxq.Recipe(judge_costs=False)
    return fxq.quantize(model, case.inputs, calibration_data=data, recipe=recipe, on_low_sqnr="ignore", progress=False)


def by_symbolic_trace(model: nn.Module, case: Case) -> nn.Module:
    """torch.fx.symbolic_trace."""
    return torch.fx.symbolic_trace(model)


def by_fx_quantization(model: nn.Module, case: Case) -> nn.Module:
    """torch.ao.quantization's prepare_fx and convert_fx with the default x86 mapping."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), case.inputs)
    runs(prepared, *case.inputs)
    return convert_fx(prepared)


def by_export(model: nn.Module, case: Case) -> nn.Module:
    """torch.export with whatever first dimensions it finds dynamic, or else with none."""
    automatic = pytree.tree_map(
        lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, torch.Tensor) else None, case.inputs
    )
    try:
        return torch.export.export(model, case.inputs, dynamic_shapes=automatic, strict=False).module()
    except Exception:
        return torch.export.export(model, case.inputs, strict=False).module()


TOOLS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "fxq": by_fxq,
    "symbolic_trace": by_symbolic_trace,
    "prepare_fx, convert_fx": by_fx_quantization,
    "export": by_export,
}


def is_quantized(result: nn.Module) -> bool:
    """Whether anything in a result computes with integers."""
    if isinstance(result, fxq.QuantizedModule):
        return any(decision.form == "int8" for decision in result.report.decisions)
    named = [type(module).__module__ for module in result.modules()]
    if isinstance(result, torch.fx.GraphModule):
        named += [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
    return any(
        ".nn.quantized" in name or ".nn.intrinsic.quantized" in name or name.startswith("quantized.") for name in named
    )


def state(model: nn.Module) -> list[Any]:
    """What a user's model is: its modules and their modes, its tensors."""
    values = [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]
    return [[(name, type(m).__name__, m.training) for name, m in model.named_modules()], values]


def is_same_state(a: list[Any], b: list[Any]) -> bool:
    """Whether two `state`s agree."""
    names = [name for name, _ in a[1]] == [name for name, _ in b[1]]
    return (
        a[0] == b[0]
        and names
        and all(x.is_meta or torch.equal(x, y) for (_, x), (_, y) in zip(a[1], b[1], strict=True))
    )


def judge(tool: str, case: Case) -> str:
    """One word for what `tool` makes of a case."""
    model = case.model()
    before = state(model)
    case = replace(case, inputs=fresh(case.inputs))
    try:
        result = TOOLS[tool](model, case)
        if case.twice:
            result = TOOLS[tool](result, case)
        expected = runs(case.model(), *case.inputs) if case.compares else None
        actual = runs(copy.deepcopy(result), *case.inputs)  # a copy: some results change with each call
    except fxq.FxqError:
        return "REF"
    except Exception:
        return "ERR"
    if not is_same_state(state(model), before) or (case.compares and not is_right(expected, actual)):
        return "BAD"
    if tool in ("fxq", "prepare_fx, convert_fx") and not is_quantized(result):
        return "FLT"
    for other in case.others:
        try:
            if not is_right(runs(case.model(), *other), runs(copy.deepcopy(result), *other)):
                return "BAD"
        except Exception as error:
            return "SHP" if tool != "fxq" or isinstance(error, fxq.GuardError) else "ERR"
    try:
        return "ok" if case.holds is None or case.holds(result, model) else "BAD"
    except Exception:
        return "ERR"


def errors() -> Iterator[str]:
    """What fxq says where it refuses, or where a call does not fit what was traced."""
    by_number = {case.number: case for case in CASES}
    for number, call in ((52, None), (4, (X[:1],)), (74, None), (91, None)):
        case = by_number[number]
        try:
            qmodel = by_fxq(case.model(), case)
            if call is not None:
                qmodel(*call)
        except fxq.FxqError as error:
            yield f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch and the models print, log and warn: torch.ao's quantization is deprecated, and says so."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(out):
            yield
    logging.disable(logging.NOTSET)


def table() -> str:
    """All cases by all tools as a table, with a line of sums."""
    with quietly():
        rows = [[judge(tool, case) for tool in TOOLS] for case in CASES]
    lines = [f"| | case | {' | '.join(TOOLS)} |", "|---|---|" + "---|" * len(TOOLS)]
    for case, words in zip(CASES, rows, strict=True):
        lines.append(f"| {case.number} | {case.title.replace('|', '&#124;')} | {' | '.join(words)} |")
    counts = [Counter(column) for column in zip(*rows, strict=True)]
    sums = ["<br>".join(f"{count[word]} {word}" for word in WORDS if count[word]) for count in counts]
    return "\n".join([*lines, f"| | **sum** | {' | '.join(sums)} |"])


def put(page: str, name: str, text: str) -> str:
    """Put `text` between the marks of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Write the table and the errors into the page."""
    torch.set_num_threads(1)
    assert [case.number for case in CASES] == list(range(1, 101))
    page = PAGE.read_text(encoding="utf8")
    page = put(page, "words", "\n".join(f"- **{word}**: {text}" for word, text in WORDS.items()))
    page = put(page, "table", table())
    with quietly():
        messages = list(errors())
    page = put(page, "errors", "```\n" + "\n\n".join(messages) + "\n```")
    PAGE.write_text(page, encoding="utf8")


if __name__ == "__main__":
    os.environ["TORCH_LOGS"] = ""
    main()
