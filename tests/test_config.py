from pathlib import Path

import pytest

from puzzle import config
from puzzle.errors import UserError

RECIPES = sorted((Path(config.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_parses(path):
    recipe = config.parse(config.read_yaml(path), str(path))
    assert recipe.out == f"runs/{path.stem}"


def test_an_unknown_key_names_its_neighbour():
    with pytest.raises(
        UserError, match=r"unknown key 'search.throughputt'; did you mean 'throughput'"
    ):
        config.parse({"search": {"throughputt": "2x"}})


def test_an_unknown_key_in_a_nested_section_names_its_neighbour():
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        config.parse({"cost": {"scenario": {"batchsize": 4}}})


def test_a_wrong_value_says_what_it_got():
    with pytest.raises(UserError, match=r"library.tokens: got -3; Input should be greater than 0"):
        config.parse({"library": {"tokens": -3}})


def test_overrides_reach_nested_keys_and_leave_the_original_alone():
    values = {"search": {"throughput": "2x"}}
    changed = config.override(values, ["search.throughput=3x", "cost.scenario.batch_size=8"])
    assert config.parse(changed).search.throughput == "3x"
    assert config.parse(changed).cost.scenario.batch_size == 8
    assert values == {"search": {"throughput": "2x"}}


@pytest.mark.parametrize("assignment", ["search", "=3", "a.b"])
def test_a_malformed_override_is_a_user_error(assignment):
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        config.override({}, [assignment])


def test_a_source_is_exactly_one_thing():
    with pytest.raises(UserError, match="exactly one of stdlib, path, dataset"):
        config.parse({"corpus": {"sources": [{"path": "a", "dataset": "b"}]}})


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "got list"), ("a: [", "not YAML"), ("", None)]
)
def test_a_recipe_file_that_is_not_a_mapping_is_a_user_error(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    if message is None:
        assert config.read_yaml(path) == {}
    else:
        with pytest.raises(UserError, match=message):
            config.read_yaml(path)


def test_a_missing_recipe_is_a_user_error():
    with pytest.raises(UserError, match="no such file"):
        config.read_yaml(Path("missing.yaml"))
