import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from puzzle import cli
from puzzle.errors import Infeasible, UserError
from puzzle.search import published
from puzzle.search.published import Bound, Question
from puzzle.search.table import Table

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "llama-3.3-70b-block-library.json"


def write(folder, text):
    path = folder / "table.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def variant(kl, ms):
    return {"stats": {"runtime_ms": ms}, "metrics": {"kl_div": kl}}


GOOD = {
    f"layer_{i}": {
        "parent": variant(0.0, 10.0),
        "half": variant(1.0 + i, 5.0),
        "none": variant(4.0, 0.0),
    }
    for i in range(3)
}


def test_the_published_library_has_the_optimum_that_the_paper_page_names():
    """Runtime and memory at most 50 % and 55 % of the parent's totals (shared/PAPER.md)."""
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not here")
    table = Table.read(PUBLISHED)
    parents = [next(iter(variants.values()))["stats"] for variants in table.layers.values()]
    runtime, memory = (sum(p[key] for p in parents) for key in ("runtime_ms", "memory_mib"))
    bounds = [Bound("stats.runtime_ms", 0.5 * runtime), Bound("stats.memory_mib", 0.55 * memory)]
    (best,) = published.search(table, Question(target="metrics.kl_div", bounds=bounds, gap=0.0))
    assert best.objective == pytest.approx(14.032297, abs=1e-6)
    assert best.gap <= 1e-12 and best.totals["stats.runtime_ms"] <= 0.5 * runtime * (1 + 1e-9)


def test_bounds_from_above_and_below_and_either_direction(tmp_path):
    table = Table.read(write(tmp_path, GOOD))
    at_most = [Bound("stats.runtime_ms", 20.0)]
    (best,) = published.search(table, Question(target="metrics.kl_div", bounds=at_most, gap=0.0))
    assert best.objective == 3.0 and set(best.choices.values()) == {"parent", "half"}
    at_least = [Bound("stats.runtime_ms", 20.0, at_least=True)]
    (worst,) = published.search(
        table, Question(target="metrics.kl_div", maximize=True, bounds=at_least, gap=0.0)
    )
    assert worst.objective == 5.0 and worst.totals["stats.runtime_ms"] == 20.0


def test_solutions_differ_in_as_many_layers_as_asked(tmp_path):
    table = Table.read(write(tmp_path, GOOD))
    question = Question(target="metrics.kl_div", gap=0.0, solutions=3, differ=2)
    answers = published.search(table, question)
    for a, b in itertools.combinations(answers, 2):
        pairs = zip(a.choices.values(), b.choices.values(), strict=True)
        assert sum(x != y for x, y in pairs) >= 2
    assert [answer.objective for answer in answers] == [0.0, 3.0, 4.0]


def test_what_cannot_be_met_names_the_best_attainable_and_the_nearest(tmp_path):
    table = Table.read(write(tmp_path, GOOD))
    bounds = [Bound("stats.runtime_ms", 10.0), Bound("metrics.kl_div", 2.0)]
    with pytest.raises(Infeasible) as raised:
        published.search(table, Question(target="metrics.kl_div", bounds=bounds))
    text = str(raised.value)
    assert "stats.runtime_ms at most 10 is reachable alone (best attainable: 0)" in text
    assert "nearest that is possible" in text
    bounds = [Bound("stats.runtime_ms", 31.0, at_least=True)]
    with pytest.raises(Infeasible, match=r"at least 31 is out of reach \(best attainable: 30\)"):
        published.search(table, Question(target="metrics.kl_div", bounds=bounds))


def command(path):
    return [
        "search",
        "--table",
        str(path),
        "--minimize",
        "metrics.kl_div",
        "--max",
        "stats.runtime_ms=20",
    ]


def broken(edit):
    copy = json.loads(json.dumps(GOOD))
    edit(copy)
    return copy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected an object of layers"),
        ("{}", "expected an object of layers"),
        ({"layer_0": []}, "layer_0: expected an object of variants"),
        ({"layer_0": {}}, "layer_0: expected an object of variants"),
        ({"layer_0": {"a": 3}}, "layer_0, 'a': expected an object of figures"),
        ('{"layer_0": {"a": {}, "a": {}}}', "'a' appears more than once"),
        ('{"layer_0": {"a": {}}, "layer_0": {"a": {}}}', "'layer_0' appears more than once"),
        (broken(lambda t: t.pop("layer_1")), "layer_1 is missing"),
        (
            broken(lambda t: t["layer_1"]["half"]["metrics"].update(kl_div=float("nan"))),
            "layer_1, 'half': metrics.kl",
        ),
        (
            broken(lambda t: t["layer_1"]["half"]["metrics"].update(kl_div="low")),
            "expected a finite number",
        ),
        (
            broken(lambda t: t["layer_1"]["half"]["metrics"].update(kl_div=True)),
            "expected a finite number",
        ),
        (
            broken(lambda t: t["layer_2"]["half"]["stats"].update(runtime_ms=-1.0)),
            "stats.runtime_ms is -1 somewhere",
        ),
        (
            broken(lambda t: t["layer_2"]["half"].pop("stats")),
            "layer_2, 'half': has no 'stats.runtime_ms'",
        ),
    ],
)
def test_a_bad_table_is_one_clear_line_and_exit_code_2(
    tmp_path, content, message, capsys, monkeypatch
):
    path = write(tmp_path, content)
    monkeypatch.setattr("sys.argv", ["puzzle", *command(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "a", "=3", "a=", "a=x", "a=nan", "a=inf"])
def test_a_bound_must_be_a_key_and_a_number(text):
    with pytest.raises(UserError, match="expected KEY=NUMBER"):
        published.parse_bounds([text], at_least=False)


def test_an_unknown_key_names_the_known_ones(tmp_path):
    with pytest.raises(
        UserError, match="has no 'metrics.kl'; expected one of: stats.runtime_ms, metrics.kl_div"
    ):
        Table.read(write(tmp_path, GOOD)).column("metrics.kl")


def test_the_command_prints_what_the_design_promises(tmp_path):
    path = write(tmp_path, GOOD)
    arguments = [*command(path), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert set(answer) == {"objective", "bound", "gap", "seconds", "totals", "choices"}
    many = CliRunner().invoke(
        cli.app, [*arguments, "--solutions", "2", "--diversity", "2", "--gap", "0"]
    )
    assert len(json.loads(many.stdout.splitlines()[-1])["solutions"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--minimize", "a", "--maximize", "b"],
        ["--minimize", "metrics.kl_div", "--throughput", "2x"],
        ["--minimize", "metrics.kl_div", "--solutions", "2", "--diversity", "9"],
        ["--minimize", "metrics.kl_div", "--gap", "-1"],
    ],
)
def test_a_wrong_command_is_a_user_error(tmp_path, arguments):
    result = CliRunner().invoke(
        cli.app, ["search", "--table", str(write(tmp_path, GOOD)), *arguments]
    )
    assert isinstance(result.exception, UserError)
