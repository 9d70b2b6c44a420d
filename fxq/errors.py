"""Every error a user of fxq can meet: one class per kind of cause, all of them `FxqError`.

A message names the subject, the value, the limit and the remedy, in the user's own terms (module path, file:line).
Laws of the project itself are `assert`s, not errors.
"""


class FxqError(Exception):
    """Anything fxq refuses to do because of what it was given."""


class InputError(FxqError):
    """The model or its inputs cannot be used: not a module, wrong arity, dtype, device or shape, empty data."""


class RecipeError(FxqError):
    """A recipe names an unknown scheme, an unknown observer, or a module that does not exist."""


class TraceError(FxqError):
    """The model could not be captured as a graph, or the captured graph does not compute what the model computes.

    what: the message without the remedy. remedy: what the user can do. module: the path of the module to blame, "" for
    the root. caught: whether the model's own code caught it and went on, as it might with any other tracer's. final:
    whether no other way of capturing the model can help.
    """

    caught = False

    def __init__(self, what: str, remedy: str = "", module: str = "", final: bool = False) -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.remedy, self.module, self.final = what, remedy, module, final


class GuardError(FxqError):
    """A call differs from the examples in something that the model's Python code decided on while it was traced."""


class CalibrationError(FxqError):
    """The calibration data is empty, or an activation or a weight is not finite."""


class QuantizationError(FxqError):
    """`strict=True` and something stays float, or the result is further from the float model than allowed."""


class TuningError(FxqError):
    """`fxq.tune` cannot go on; `found` is the `Tuning` found so far, or None."""

    def __init__(self, message: str, found: object = None) -> None:
        super().__init__(message)
        self.found = found


class VerifyError(FxqError):
    """A pass left a graph that is not legal in its stage, or broke the numbers contract that it states.

    Or a graph fails on the examples after a pass, or as it was traced: code inside of a leaf may raise at any call.
    """


class GoldenError(FxqError):
    """A graph holds an op whose float arithmetic NumPy cannot repeat bit for bit."""


class KernelError(FxqError):
    """The native kernels could not be built or loaded as asked, or an instruction set is not available here."""


class FileError(FxqError):
    """A saved model cannot be read: another format, another version, damaged, or it needs trust that was not given."""
