"""fxq turns a float PyTorch model into an exact, readable int8 one.

    qmodel = fxq.quantize(model, example_inputs)

Names are loaded when they are first used, so that `fxq.numerics` and `fxq.golden_model` run without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxq.api import (
        AccuracyWarning,
        KeptFloatWarning,
        calibrate,
        convert,
        prepare,
        quantize,
        trace,
    )
    from fxq.decisions import Decision, Reason, Report
    from fxq.drawing import draw, to_networkx
    from fxq.errors import (
        CalibrationError,
        FileError,
        FxqError,
        GoldenError,
        GuardError,
        InputError,
        KernelError,
        QuantizationError,
        RecipeError,
        TraceError,
        TuningError,
        VerifyError,
    )
    from fxq.expansion import expand
    from fxq.files import load, save
    from fxq.golden_model import GoldenModel
    from fxq.importing import from_torch
    from fxq.inspection import compare, golden, profile, report
    from fxq.profiling import Profile
    from fxq.quantized import QuantizedModule
    from fxq.recipe import FLOAT, Recipe, Rule
    from fxq.swapping import swap_linears
    from fxq.training import freeze_batch_norm, freeze_observers, prepare_qat
    from fxq.tuning import Tuning, tune

__version__ = "0.1.0"

_HOMES = {
    "fxq.api": (
        "AccuracyWarning",
        "KeptFloatWarning",
        "calibrate",
        "convert",
        "prepare",
        "quantize",
        "trace",
    ),
    "fxq.importing": ("from_torch",),
    "fxq.inspection": ("compare", "golden", "profile", "report"),
    "fxq.drawing": ("draw", "to_networkx"),
    "fxq.errors": (
        "CalibrationError",
        "FileError",
        "FxqError",
        "GoldenError",
        "GuardError",
        "InputError",
        "KernelError",
        "QuantizationError",
        "RecipeError",
        "TraceError",
        "TuningError",
        "VerifyError",
    ),
    "fxq.expansion": ("expand",),
    "fxq.golden_model": ("GoldenModel",),
    "fxq.profiling": ("Profile",),
    "fxq.files": ("load", "save"),
    "fxq.quantized": ("QuantizedModule",),
    "fxq.recipe": ("FLOAT", "Recipe", "Rule"),
    "fxq.tuning": ("Tuning", "tune"),
    "fxq.swapping": ("swap_linears",),
    "fxq.training": ("freeze_batch_norm", "freeze_observers", "prepare_qat"),
    "fxq.decisions": ("Decision", "Reason", "Report"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FLOAT",
    "AccuracyWarning",
    "CalibrationError",
    "Decision",
    "FileError",
    "FxqError",
    "GoldenError",
    "GoldenModel",
    "GuardError",
    "InputError",
    "KeptFloatWarning",
    "KernelError",
    "Profile",
    "QuantizationError",
    "QuantizedModule",
    "Reason",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "TraceError",
    "Tuning",
    "TuningError",
    "VerifyError",
    "calibrate",
    "compare",
    "convert",
    "draw",
    "expand",
    "freeze_batch_norm",
    "freeze_observers",
    "from_torch",
    "golden",
    "load",
    "prepare",
    "prepare_qat",
    "profile",
    "quantize",
    "report",
    "save",
    "swap_linears",
    "to_networkx",
    "trace",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("fxq.nn")
    if name not in _HOME:
        raise AttributeError(f"module 'fxq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
