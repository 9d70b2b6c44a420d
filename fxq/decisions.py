"""What became of every operation of the float graph, and why: nothing stays float in silence.

The completeness law: each call of the normalised float graph is in the report exactly once.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Form = Literal["int8", "weight", "moved", "float", "aside"]
"""int8: runs on integers; weight: reads int8 weights and computes in float; moved: passes integers on unchanged; float:
a float island; aside: sizes, ids, masks."""


class Reason(enum.Enum):
    """Why an operation is not int8, with the remedy that a user has."""

    NO_INTEGER_OP = ("fxq has no integer form of it", "")
    USER_EXCLUDED = ("the recipe keeps it float", "remove the rule from the recipe")
    DYNAMIC_WEIGHT = ("its weight is computed at run time", "make the weight a parameter or buffer")
    NON_FLOAT = ("it computes shapes, integers or booleans", "")
    ACC_OVERFLOW = ("its dot product can leave int32", "split the layer, or keep it float in the recipe")
    NOT_FLOAT32 = ("its data is not float32", "convert the model and inputs with .float()")
    OWN_FLOAT = ("fxq computes it in float32, in steps of a fixed order: the same bits everywhere", "")
    UNPROFITABLE = ("integers would cost accuracy or time", "")
    OTHER_SCHEME = ("it has no form in the scheme that the recipe gives it", "give it another scheme in the recipe")
    FLOAT_OPERANDS = ("what it reads is float here, so integers would only cost accuracy", "")
    FLOAT_READER = ("its result is read in float, so integers would only cost accuracy", "")
    FLOAT_DATA = ("it moves data that is float here", "")
    ALIASED = ("its memory is modified in place", "write the assignment out of place")
    LEAF_MODULE = ("its code is not looked into", "")
    RECURRENT = (
        "torch computes its gates, and all steps, in one call that fxq does not take apart",
        "write them with nn.Linear",
    )
    UNTRACEABLE = ("its code cannot be traced", "write it with torch functions (torch.where, ...)")

    def __init__(self, text: str, remedy: str) -> None:
        self.text = text
        self.remedy = remedy


@dataclass(frozen=True)
class Decision:
    """What became of one operation.

    node: its name in the float graph; module: the user's module path; line: the user's file:line; op: its spelling;
    macs: multiply-accumulates on the examples (0 where the op is not a product); detail: what the reason is about;
    scheme: the recipe's scheme that it runs in, "" where it computes no product or sum in one.
    """

    node: str
    module: str
    line: str
    op: str
    form: Form
    reason: Reason | None = None
    detail: str = ""
    macs: int = 0
    scheme: str = ""

    def __str__(self) -> str:
        place = self.module or self.line or self.node
        if self.reason is None:
            return f"{self.form:<6}  {place}  {self.op}  {self.detail}".rstrip()
        text = f"kept {self.form}  {place}  {self.op}  {self.reason.name}  {self.detail or self.reason.text}"
        return f"{text} -> {self.reason.remedy}" if self.reason.remedy else text


@dataclass
class Report:
    """The decisions of one conversion and its figures; `print` it, or take `to_dict()`.

    sqnr: signal to quantization noise of the output on the examples in dB, None where the model was not compared.
    recipe, recipe_code: its title, and all of it as Python text, "" where torch has quantized the model.
    weight_bytes: of all parameters and buffers, before and after. guards: what tracing fixed on a value.
    equalized: by the name of a float value, the dimension of its channels and by what the integers' are divided.
    float_steps: under requant="fixed", where float arithmetic remains between the model's edges. seconds: what each
    method that calibration data decides about took, with the number of its changes.
    """

    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    frontend: str = "value-carrying symbolic trace"
    recipe: str = ""
    recipe_code: str = ""
    weight_bytes: tuple[int, int] = (0, 0)
    sqnr: float | None = None
    float_steps: list[str] = field(default_factory=list)
    equalized: dict[str, tuple[int, list[float]]] = field(default_factory=dict)
    seconds: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates on the examples: in int8, and in all."""
        return sum(d.macs for d in self.decisions if d.form == "int8"), sum(d.macs for d in self.decisions)

    @property
    def int8_share(self) -> float:
        """The share of multiply-accumulates that run in int8, in 0..1; 1 where there are none."""
        int8, total = self.macs
        return int8 / total if total else 1.0

    def kept_float(self) -> list[Decision]:
        """The float islands."""
        return [decision for decision in self.decisions if decision.form == "float"]

    def add_details(self, details: Mapping[str, str]) -> None:
        """Add to what is told of the operations with these nodes."""
        self.decisions = [
            replace(d, detail=", ".join(filter(None, (d.detail, details[d.node])))) if details.get(d.node) else d
            for d in self.decisions
        ]

    def refusals(self) -> list[Decision]:
        """Products (operations with multiply-accumulates) that stay float without the user having asked for it."""
        return [d for d in self.kept_float() if d.macs and d.reason is not Reason.USER_EXCLUDED]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; `from_dict` reads it back."""
        plain = asdict(self)
        for entry in plain["decisions"]:
            entry["reason"] = entry["reason"].name if entry["reason"] is not None else None
        plain["weight_bytes"] = list(self.weight_bytes)
        plain["seconds"] = {name: list(pair) for name, pair in self.seconds.items()}
        plain["int8_share"] = self.int8_share
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        fields = {key: value for key, value in plain.items() if key != "int8_share"}
        fields["weight_bytes"] = tuple(fields["weight_bytes"])
        fields["seconds"] = {name: tuple(pair) for name, pair in fields.get("seconds", {}).items()}
        fields["decisions"] = [
            Decision(**{**entry, "reason": Reason[entry["reason"]] if entry["reason"] else None})
            for entry in fields["decisions"]
        ]
        return cls(**fields)

    def __str__(self) -> str:
        rows = [("form", "module", "op", "scheme", "MACs", "why, and what to do")]
        for d in self.decisions:
            if d.form == "aside":
                continue
            why = d.detail
            if d.reason is not None:
                why = f"{d.reason.name}: {d.detail or d.reason.text}"
                why += f" -> {d.reason.remedy}" if d.reason.remedy else ""
            rows.append((d.form, d.module or "(root)", d.op, d.scheme, f"{d.macs:,}" if d.macs else "", why))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([*map(str.ljust, row[:4], widths), row[4].rjust(widths[4]), row[5]]).rstrip() for row in rows
        ]
        lines.insert(1, "-" * min(100, max(map(len, lines))))
        forms = Counter(d.form for d in self.decisions)
        int8, total = self.macs
        before, after = self.weight_bytes
        lines += [
            "",
            f"recipe {self.recipe}, captured by {self.frontend}",
            f"operations: {forms['int8']} int8, "
            + (f"{forms['weight']} float with int8 weights, " if forms["weight"] else "")
            + f"{forms['moved']} moved as integers, {forms['float']} float, {forms['aside']} aside (sizes, ids, masks)",
            f"multiply-accumulates in int8: {int8:,} of {total:,} ({100 * self.int8_share:.1f} %)",
            f"parameters and buffers: {before:,} bytes before, {after:,} after"
            + (f" ({before / after:.2f}x smaller)" if after else ""),
        ]
        if self.sqnr is not None:
            lines.append(f"output against the float model on the examples: {self.sqnr:.1f} dB SQNR")
        if "requant fixed" in self.recipe:
            count = f"{len(self.float_steps)} operations" if self.float_steps else "no operation"
            lines.append(f"float arithmetic between the quantized inputs and the dequantized outputs: {count}")
            lines += [f"  {step}" for step in self.float_steps]
        lines += [
            f"{name}: {count} change{'' if count == 1 else 's'} in {seconds:.2f} s"
            + (f", {1000 * seconds / count:.0f} ms each" if count else "")
            for name, (count, seconds) in self.seconds.items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"guard: {guard}" for guard in self.guards]
        return "\n".join(lines)
