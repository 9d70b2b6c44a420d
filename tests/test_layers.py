"""The layers of the architecture: each module imports lower ones only."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"fxq.errors", "fxq.memory", "fxq.qtypes", "fxq.randomness"},
    {"fxq.numerics"},
    {"fxq.kernels"},
    {
        "fxq.decisions",
        "fxq.double",
        "fxq.observers",
        "fxq.ranges",
        "fxq.sampling",
        "fxq.inputs",
        "fxq.graph",
        "fxq.tracing",
    },
    {
        "fxq.recipe",
        "fxq.qdq",
        "fxq.outputs",
        "fxq.layout",
        "fxq.spelling",
        "fxq.rewriting",
        "fxq.elementwise",
        "fxq.pattern",
        "fxq.packing",
        "fxq.macs",
    },
    {
        "fxq.gradients",
        "fxq.refusals",
        "fxq.family",
        "fxq.clamps",
        "fxq.product",
        "fxq.calls",
        "fxq.releasing",
        "fxq.stages",
        "fxq.fake_quantize",
        "fxq.batch_norm",
    },
    {"fxq.ops"},
    {"fxq.nn"},
    {"fxq.engine", "fxq.torch_quantized"},
    {
        "fxq.codegen",
        "fxq.in_place",
        "fxq.attention_by_hand",
        "fxq.shapes",
        "fxq.expansion",
        "fxq.runs",
        "fxq.golden_files",
        "fxq.golden_images",
        "fxq.golden_model",
        "fxq.golden_moves",
        "fxq.golden_ops",
        "fxq.golden_program",
        "fxq.dump",
        "fxq.drawing",
        "fxq.comparison",
        "fxq.effects",
        "fxq.noise",
        "fxq.paired_runs",
        "fxq.costs",
        "fxq.profiling",
        "fxq.encoding",
        "fxq.files",
        "fxq.quantized",
        "fxq.remedies",
    },
    {"fxq.pipeline", "fxq.checks", "fxq.reconstruction", "fxq.simulation", "fxq.swapping", "fxq.leaves"},
    {"passes"},
    {"fxq.api"},
    {"fxq.importing", "fxq.inspection", "fxq.training"},
    {"fxq.tuning"},
    {"fxq.cli"},
    {"fxq.__main__"},
]
"""From the lowest; a package counts as one module, and modules of one layer may import each other in one direction."""
SIBLINGS = {"fxq.ops", "passes"}
"""Packages whose modules do not import one another."""


def modules():
    for folder in ("fxq", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name != "fxq":  # loads names of all layers, on demand
                yield name, ast.parse(path.read_text())


def imports(tree):
    """Names of the project's modules that a module imports, with whether it does so at its top level."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("fxq", "passes"):
                yield name, id(node) in top


def module_of(name, known):
    """`fxq.graph.call` -> `fxq.graph`."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def package_of(module):
    return (
        module
        if module.startswith("fxq.") and module.count(".") == 1
        else ".".join(module.split(".")[: 2 if module.startswith("fxq") else 1])
    )


def level(module):
    return next((i for i, layer in enumerate(LAYERS) if package_of(module) in layer), None)


TREES = dict(modules())
EDGES = [
    (module, module_of(name, TREES), at_top)
    for module, tree in TREES.items()
    for name, at_top in imports(tree)
    if module_of(name, TREES) != "fxq"
]


def test_each_module_has_a_layer():
    assert [module for module in TREES if level(module) is None] == []


def test_imports_go_down():
    upward = [(a, b) for a, b, _ in EDGES if level(a) < level(b)]
    assert upward == []


def test_no_imports_inside_functions():
    assert [(a, b) for a, b, at_top in EDGES if not at_top] == []


def test_no_cycles():
    edges = {(package_of(a), package_of(b)) for a, b, at_top in EDGES if at_top} - {
        (m, m) for m in map(package_of, TREES)
    }
    remaining = {module for edge in edges for module in edge}
    while free := {m for m in remaining if not any(a == m and b in remaining for a, b in edges)}:
        remaining -= free
    assert remaining == set()


def test_the_readme_lists_the_layers():
    listed = (ROOT / "README.md").read_text().partition("\nLayers, ")[2].partition("\n\n")[2].partition("\n\n")[0]
    places = [
        (pattern, place)
        for place, line in enumerate(listed.splitlines())
        for pattern in re.findall(r"[\w.*]+", names(line))
    ]

    def place(module):
        found = [place for pattern, place in places if fnmatch.fnmatch(module, pattern.removesuffix(".*"))]
        assert len(found) == 1, (module, found)
        return found[0]

    edges = [(a, b) for a, b in ((package_of(a), package_of(b)) for a, b, _ in EDGES) if a != "fxq.__main__"]
    assert [(a, b) for a, b in edges if place(a) > place(b)] == []
    assert len(places) == len({pattern for pattern, _ in places})


def names(line):
    """The first column."""
    return re.split(r" {2,}", line.strip())[0]


@pytest.mark.parametrize("package", sorted(SIBLINGS))
def test_siblings_do_not_import_one_another(package):
    siblings = {module for module in TREES if module.startswith(f"{package}.")}
    assert [(a, b) for a, b, _ in EDGES if a in siblings and b in siblings] == []


@pytest.mark.parametrize(
    "code",
    [
        "import passes",
        "import passes.lower, fxq",
        "import fxq, sys; assert 'torch' not in sys.modules",
        "import fxq.numerics, sys; assert 'torch' not in sys.modules",
    ],
)
def test_imports_in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
