import re
from pathlib import Path

import pytest
import yaml

from puzzle import config, settings
from puzzle.errors import UserError

RECIPES = sorted((Path(settings.__file__).parent / "recipes").glob("*.yaml"))
assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_parses(path):
    recipe = config.parse(settings.read_yaml(path), str(path))
    assert recipe.out == f"runs/{path.stem}"


ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
YAML_BLOCKS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```ya?ml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), YAML_BLOCKS)
def test_every_yaml_in_the_docs_is_a_recipe(page, block):
    recipe = config.parse(yaml.safe_load(block), page)
    assert recipe.all_children() and recipe.all_places()


def test_a_listed_place_has_the_recipes_deploy_unless_it_names_its_own():
    """Otherwise it would add blocks to the space, and so a new library."""
    places = {"laptop": {"cost": {"engine": "torch"}}, "phone": {"deploy": ["llama.cpp"]}}
    recipe = config.parse({"deploy": ["transformers"], "places": places})
    again = config.parse(recipe.model_dump(mode="json"))
    for found in (recipe.all_places(), again.all_places()):
        assert found["laptop"].deploy == ["transformers"] and found["phone"].deploy == ["llama.cpp"]


def test_the_docs_have_recipes():
    assert {"README.md"} <= {page for page, _ in YAML_BLOCKS}


def test_an_unknown_key_names_its_neighbour():
    with pytest.raises(
        UserError, match=r"unknown key 'search.throughputt'; did you mean 'throughput'"
    ):
        config.parse({"search": {"throughputt": "2x"}})


def test_an_unknown_key_in_a_nested_section_names_its_neighbour():
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        config.parse({"cost": {"scenario": {"batchsize": 4}}})


def test_a_wrong_value_says_what_it_got():
    with pytest.raises(UserError, match=r"library.tokens: got -3; expected more than 0"):
        config.parse({"library": {"tokens": -3}})


def test_a_source_is_exactly_one_thing():
    with pytest.raises(UserError, match="exactly one of stdlib, parent, path, dataset"):
        config.parse({"corpus": {"sources": [{"path": "a", "dataset": "b"}]}})


@pytest.mark.parametrize("section", ["search", "children"])
def test_a_wish_without_a_unit_is_answered_with_one(section):
    wish = {"throughput": 2}
    recipe = {"search": wish} if section == "search" else {"children": {"fast": {"search": wish}}}
    with pytest.raises(UserError, match=r"throughput: got 2; expected a number .*: 2x$"):
        config.parse(recipe).all_children()
