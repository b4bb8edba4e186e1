import json
import subprocess
import sys

import pytest


def puzzle(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "puzzle.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "recipe nothing.yaml: no such file"),
        (["run", "--set", "serach.throughput=2x"], "unknown key 'serach'; did you mean 'search'"),
        (["status", "nowhere"], "no run.yaml there"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    out = puzzle(*arguments, cwd=tmp_path)
    assert out.returncode == 2
    assert message in out.stderr and out.stderr.count("\n") == 1
    assert out.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.training
def test_a_stage_before_its_turn_names_the_missing_command(tiny_run):
    tiny_run.write_recipe()
    out = puzzle("score", tiny_run.folder)
    assert out.returncode == 2 and f"run `puzzle library {tiny_run.folder}` first" in out.stderr


@pytest.mark.training
def test_an_impossible_wish_is_one_line_and_exit_code_3(finished_run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished_run.folder, copy)
    out = puzzle("search", copy, "--throughput", "99x", "--quiet")
    assert out.returncode == 3
    assert (
        out.stderr.startswith("puzzle: search: no architecture meets")
        and out.stderr.count("\n") == 1
    )


@pytest.mark.training
def test_search_options_replace_the_constraints_and_json_is_the_last_line(finished_run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished_run.folder, copy)
    out = puzzle("search", copy, "--parameters", "70%", "--json")
    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout.splitlines()[-1])["blocks"]) == 4
    asked = json.loads((copy / "search" / "solutions.json").read_text())["constraints"]
    assert [c["name"] for c in asked] == ["parameters"]


def test_a_constraint_can_be_given_by_scenario():
    from puzzle.cli import _by_scenario

    assert _by_scenario("main=2x,chat=1.5x") == "{main: 2x, chat: 1.5x}"
    assert _by_scenario("2x") == "2x" and _by_scenario(None) == "null"


@pytest.mark.training
def test_plan_and_status_answer_without_spending_anything(finished_run):
    status = puzzle("status", finished_run.folder, "--json")
    rows = json.loads(status.stdout.splitlines()[-1])
    assert {row["state"] for row in rows} == {"done"}
    plan = puzzle("plan", finished_run.folder / "run.yaml", "--json")
    stages = json.loads(plan.stdout.splitlines()[-1])["stages"]
    assert [s["stage"] for s in stages] == [
        "library",
        "score",
        "cost",
        "search",
        "assemble",
        "uptrain",
        "evaluate",
    ]
    assert all(s["memory_bytes"] > 0 for s in stages)
