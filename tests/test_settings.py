from pathlib import Path

import pytest

from puzzle import config, settings
from puzzle.errors import UserError


def test_overrides_reach_nested_keys_and_leave_the_original_alone():
    values = {"search": {"throughput": "2x"}}
    changed = settings.override(values, ["search.throughput=3x", "cost.scenario.batch_size=8"])
    assert config.parse(changed).search.throughput == "3x"
    assert config.parse(changed).cost.scenario.batch_size == 8
    assert values == {"search": {"throughput": "2x"}}


@pytest.mark.parametrize("assignment", ["search", "=3", "a.b"])
def test_a_malformed_override_is_a_user_error(assignment):
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        settings.override({}, [assignment])


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b", "got list"), ("a: [", "not YAML"), ("", None)]
)
def test_a_recipe_file_that_is_not_a_mapping_is_a_user_error(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    if message is None:
        assert settings.read_yaml(path) == {}
    else:
        with pytest.raises(UserError, match=message):
            settings.read_yaml(path)


def test_a_missing_recipe_is_a_user_error():
    with pytest.raises(UserError, match="no such file"):
        settings.read_yaml(Path("missing.yaml"))
