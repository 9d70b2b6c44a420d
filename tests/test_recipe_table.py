"""The table of recipes by features (docs/recipes.md) says what fxq does."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "recipe_table.py"


def script():
    """docs/recipe_table.py, whose models can be pickled."""
    if "recipe_table" not in sys.modules:
        spec = importlib.util.spec_from_file_location("recipe_table", SCRIPT)
        sys.modules["recipe_table"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["recipe_table"])
    return sys.modules["recipe_table"]


@pytest.mark.parametrize("recipe", script().RECIPES)
def test_a_recipe_goes_through_everything(recipe):
    lines = script().PAGE.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| | "))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head:] if line.startswith("|")]
    at = cells[0].index(recipe)
    assert script().column(recipe) == {row[0]: row[at] for row in cells[2:]}
