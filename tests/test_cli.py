"""The command line: exit codes, one line for what is wrong, the last line of `--json`."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from puzzle.commands.options import constraint


def puzzle(*arguments, cwd=None):
    command = [sys.executable, "-m", "puzzle.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def last_line(out):
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def checksums(folder):
    """Content of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    copy = tmp_path / "run"
    shutil.copytree(finished_run.folder, copy)
    return copy


@pytest.mark.training
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "recipe nothing.yaml: no such file"),
        (
            ["run", "--set", "serach.throughput=2x"],
            "unknown key 'serach'; did you mean 'search'",
        ),
        (["status", "nowhere"], "no run.yaml there"),
        (["search", "nowhere", "--throughput", "2x"], "no run.yaml there"),
        (["child", "nowhere", "--name", "fast"], "no run.yaml there"),
        (["search", "--minimize", "kl"], "give a run directory, or --table FILE"),
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
    tiny_run.write()
    out = puzzle("score", tiny_run.folder)
    assert out.returncode == 2 and f"run `puzzle library {tiny_run.folder}` first" in out.stderr


@pytest.mark.training
def test_an_impossible_wish_is_one_line_and_exit_code_3(finished_run):
    out = puzzle("search", finished_run.folder, "--throughput", "99x", "--quiet")
    assert out.returncode == 3
    assert out.stderr.startswith("puzzle: search: no architecture meets")
    assert out.stderr.count("\n") == 1


@pytest.mark.training
def test_a_question_changes_no_file_whether_it_has_an_answer_or_not(finished_run):
    before = checksums(finished_run.folder)
    answer = last_line(puzzle("search", finished_run.folder, "--parameters", "70%", "--json"))
    assert [c["name"] for c in answer["constraints"]] == ["parameters"]
    assert len(answer["solutions"][0]["blocks"]) == 4
    assert puzzle("search", finished_run.folder, "--throughput", "99x").returncode == 3
    assert checksums(finished_run.folder) == before


def test_a_constraint_can_be_given_by_scenario():
    assert constraint("main=2x,chat=1.5x") == {"main": "2x", "chat": "1.5x"}
    assert constraint("2x") == "2x"


@pytest.mark.training
def test_plan_and_status_answer_without_spending_anything(finished_run):
    rows = last_line(puzzle("status", finished_run.folder, "--json"))
    assert {row["state"] for row in rows} == {"done"}
    plan = last_line(puzzle("plan", finished_run.folder / "run.yaml", "--json"))
    names = ["library", "score", "cost", "search", "assemble", "uptrain", "evaluate", "report"]
    assert [stage["stage"] for stage in plan["stages"]] == names
    memory = {
        stage["stage"]: stage["memory_bytes"] + stage["host_bytes"] for stage in plan["stages"]
    }
    nothing = [stage for stage, taken in memory.items() if not taken > 0]
    assert nothing == ["cost", "assemble"]  # modelled: nothing is served on this machine


# ---------------------------------------------------------------------------------------- children


@pytest.mark.training
def test_a_second_child_leaves_the_first_and_everything_shared_as_they_were(run_copy):
    shared = ("library", "score", "corpus", "places", "children/main")
    before = {name: checksums(run_copy / name) for name in shared}
    made = last_line(puzzle("child", run_copy, "--name", "fast", "--throughput", "1.5x", "--json"))
    assert made["name"] == "fast" and made["verdict"] == "met"
    assert {name: checksums(run_copy / name) for name in shared} == before
    rows = last_line(puzzle("status", run_copy, "--json"))
    assert {row["state"] for row in rows} == {"done"}
    assert {row.get("child") for row in rows} == {None, "main", "fast"}
    listed = {row["child"]: row for row in last_line(puzzle("children", run_copy, "--json"))}
    assert listed["fast"]["wish"] == "throughput 1.5x"
    assert listed["fast"]["measured_speedup"] > listed["main"]["measured_speedup"]
    assert listed["fast"]["parameters"] < listed["main"]["parameters"]
    puzzle("remove", run_copy, "--child", "fast")
    assert not (run_copy / "children" / "fast").exists()
    assert {name: checksums(run_copy / name) for name in shared} == before


@pytest.mark.training
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("child", "--name", "main", "--throughput", "99x"), 3),
        (("uptrain", "--set", "place=nowhere"), 2),
        (("uptrain", "--set", "uptrain.lora_rank=-1"), 2),
    ],
)
def test_what_cannot_be_made_costs_no_finished_child(run_copy, command, code):
    before = checksums(run_copy)
    out = puzzle(command[0], run_copy, *command[1:])
    assert out.returncode == code and out.stderr.count("puzzle:") == 1
    assert checksums(run_copy) == before


@pytest.mark.training
def test_a_child_that_was_made_for_an_earlier_wish_is_listed_as_stale(run_copy):
    assert "stale" not in puzzle("children", run_copy).stdout
    wish = run_copy / "children" / "main" / "child.yaml"
    wish.write_text(wish.read_text().replace("throughput: 1.3x", "throughput: 1.4x"))
    out = puzzle("children", run_copy, "--json")
    assert out.stdout.count("stale") == 2 and not last_line(out)[0]["current"]
    exported = puzzle("export", run_copy, "--to", "nemotron-nas")
    assert "child main was made for an earlier wish" in exported.stderr


@pytest.mark.training
def test_a_refused_setting_removes_no_finished_stage(run_copy):
    before = checksums(run_copy / "library")
    out = puzzle("library", run_copy, "--set", "library.kv_heads=[3]")
    assert out.returncode == 2 and "kv_heads: got 3" in out.stderr
    assert checksums(run_copy / "library") == before


@pytest.mark.training
def test_the_same_command_again_finds_the_child_done(run_copy):
    command = ("child", run_copy, "--name", "fast", "--throughput", "1.5x")
    assert puzzle(*command).returncode == 0
    before = checksums(run_copy)
    again = puzzle(*command)
    assert again.returncode == 0 and again.stderr.count("up to date") == 6
    assert checksums(run_copy) == before


@pytest.mark.training
def test_a_child_from_a_file_or_from_a_numbered_solution_is_exactly_that_one(run_copy, tmp_path):
    blocks = ["gqa_2+gated_96", "gqa_1+gated_96", "gqa_2+gated_32", "gqa_2+gated_96"]
    listed = last_line(
        puzzle("search", run_copy, "--throughput", "1.2x", "--solutions", "3", "--json")
    )
    second = listed["solutions"][1]["blocks"]
    names = {block for solution in listed["solutions"] for block in solution["blocks"]}
    blocks = [next(iter(sorted(names)))] * 4
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    made = last_line(
        puzzle(
            "child",
            run_copy,
            "--name",
            "given",
            "--architecture",
            tmp_path / "blocks.json",
            "--set",
            "search.throughput=null",
            "--json",
        )
    )
    assert made["architecture"] == blocks
    made = last_line(
        puzzle(
            "child",
            run_copy,
            "--name",
            "second",
            "--throughput",
            "1.2x",
            "--solution",
            "1",
            "--set",
            "search.solutions=3",
            "--json",
        )
    )
    assert made["architecture"] == second


@pytest.mark.training
def test_a_numbered_solution_of_a_target_is_made_and_can_be_read_again(run_copy):
    wish = ("--maximize", "throughput", "--kl", "0.2", "--set", "search.solutions=2")
    listed = last_line(puzzle("search", run_copy, *wish, "--json"))
    made = last_line(
        puzzle("child", run_copy, "--name", "second", *wish, "--solution", "1", "--json")
    )
    assert made["architecture"] == listed["solutions"][1]["blocks"]
    assert "second" in puzzle("children", run_copy).stdout


@pytest.mark.training
def test_a_recipe_can_list_several_children(finished_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished_run.folder, copy, ignore=shutil.ignore_patterns("children"))
    recipe = yaml.safe_load((copy / "run.yaml").read_text())
    recipe["out"] = str(copy)
    recipe["children"] = {
        "small": {"search": {"parameters": "70%"}},
        "fast": {"search": {"throughput": "1.5x"}, "uptrain": {"tokens": 1024}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = puzzle("run", tmp_path / "recipe.yaml", "--json")
    children = {row["child"]: row for row in last_line(out)["children"]}
    assert children["small"]["wish"] == "parameters 70%"
    assert children["fast"]["wish"] == "throughput 1.5x"
    assert all(child["verdict"] == "met" for child in children.values())
    assert out.stderr.count("library: up to date") == 1 and not (copy / "children/main").exists()


@pytest.mark.training
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["child", "--name", "../x", "--throughput", "2x"], "child '../x': expected a name of"),
        (["child", "--name", "a", "--throughput", "fast"], "search.throughput: got 'fast'"),
        (["child", "--name", "a", "--place", "moon"], "no place 'moon'; expected one of here"),
        (["child", "--name", "a", "--set", "library.tokens=1"], "'library' is no setting of"),
        (["child", "--name", "a", "--architecture", "none.json"], "none.json: no such file"),
        (["assemble", "--child", "slow"], "no child 'slow'; expected one of main"),
        (["remove", "--child", "slow"], "no child 'slow'; expected one of main"),
        (["cost", "--set", "library.tokens=1"], "'library' is no setting of a place"),
        (["library", "--set", "search.throughput=2x"], "'search' is no setting of the run"),
    ],
)
def test_a_wrong_child_or_place_is_one_line_and_changes_nothing(finished_run, arguments, message):
    before = checksums(finished_run.folder)
    command, *options = arguments
    out = puzzle(command, finished_run.folder, *options)
    assert out.returncode == 2, out.stderr
    assert message in out.stderr and out.stderr.count("\n") == 1
    assert checksums(finished_run.folder) == before
