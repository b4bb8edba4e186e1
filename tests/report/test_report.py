"""The page and the closing table say what the run's files say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from puzzle import artifacts
from puzzle.commands.summary import summaries
from puzzle.evaluate import results as evaluation
from puzzle.report import compare, page
from puzzle.report.stage import page as page_path
from puzzle.report.stage import stage_seconds
from puzzle.report.table import print_results, rows
from puzzle.run import Run

pytestmark = pytest.mark.training
LEAST_RETENTION = {"value": 0.877, "low": 0.832, "high": 0.9123}


@pytest.fixture
def job(finished_run):
    return finished_run.child_job("main")


@pytest.fixture
def copied(finished_run, tmp_path):
    """A run whose files a test may change."""
    shutil.copytree(finished_run.folder, tmp_path / "run")
    return Run(finished_run.recipe, tmp_path / "run", finished_run.progress).child_job("main")


def render(job) -> str:
    return page.html(job, stage_seconds(job))


def test_the_page_stands_alone_and_shows_every_row_of_the_table(job):
    html = page_path(job).read_text()
    assert html.count("<svg") == 8
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", html) and "url(" not in html
    assert "@import" not in html and len(html.encode()) < 1 << 20
    for row in rows(evaluation.read(job)):
        assert all(f">{cell}</td>" in html for cell in row[1:])


def test_modelled_speeds_are_called_modelled(job):
    assert "modelled, not measured" in page_path(job).read_text()
    assert not any("measured" in row.name for row in rows(evaluation.read(job)))


def test_the_retention_is_the_share_of_the_parents_accuracy(job):
    results = evaluation.read(job)
    top1 = results.parent.quality.top1.value
    if top1:
        kept, expected = results.uptrained.retention, results.uptrained.quality.top1.value / top1
        assert kept.value == pytest.approx(expected) and kept.low <= kept.value <= kept.high
    assert results.parent.kv_cache_bytes_per_token == 4 * 2 * 2 * 16 * 4


def change(path, keys, value) -> None:
    """Set one value in a JSON file, or in the first line of a JSON Lines file."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = record = json.loads(lines[0])
    record.pop("checksum", None)  # as for a line that is edited by hand
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    first = json.dumps(record)
    path.write_text("\n".join([first, *lines[1:]]) + "\n")


CHILD = "children/main"
RESULTS = f"{CHILD}/evaluate/results.json"
CHANGES = {  # file, where in it, the new value, what the page then says
    "retention": (RESULTS, ["uptrained", "retention"], LEAST_RETENTION, "87.7%"),
    "KL": (RESULTS, ["uptrained", "quality", "kl", "value"], 0.71237, "0.7124"),
    "perplexity": (RESULTS, ["parent", "quality", "perplexity", "value"], 97.531, "97.531"),
    "parameters": (RESULTS, ["uptrained", "parameters"], 87654, "87,654"),
    "position": (RESULTS, ["uptrained", "by_position", "kl", 0, "value"], 0.98761, "0.9876"),
    "task": (RESULTS, ["tasks", 0, "uptrained", "value"], 0.4321, "43.2 %"),
    "sample": (RESULTS, ["samples", 0, "child"], "<b>& so</b>", "&lt;b&gt;&amp; so&lt;/b&gt;"),
    "speed": (
        RESULTS,
        ["served", "scenarios", "main", "measurement", "speedup"],
        {"value": 1.777, "low": 1.76, "high": 1.79},
        "1.78x",
    ),
    "percentile": (
        RESULTS,
        ["served", "scenarios", "main", "measurement", "child", "inter_token", "p95"],
        1e6,
        None,
    ),
    "score": ("score/scores.jsonl", ["result", "sums", "kl"], 123.456, None),
    "frontier": (f"{CHILD}/search/frontier.jsonl", ["objective"], 0.456789, "0.4568"),
    "baseline": (f"{CHILD}/search/baselines.jsonl", ["objective"], 0.876543, "0.8765"),
    "library": ("library/index.jsonl", ["nmse_after"], 0.0123456, "0.01235"),
    "BLD": ("library/curve.jsonl", ["validation"], 0.0765432, None),
    "uptraining": (f"{CHILD}/uptrained/curve.jsonl", ["losses", "kl"], 0.345678, None),
    "cost": ("places/here/costs.jsonl", ["decode_s"], 9.0, None),
    "time": ("library/manifest.json", ["seconds"], 4321.0, "1 h 12 min"),
    "version": (f"{CHILD}/evaluate/manifest.json", ["versions", "torch"], "9.9.9", "torch 9.9.9"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_figure_that_changes_in_a_file_changes_on_the_page(name, copied):
    file, keys, value, shown = CHANGES[name]
    before = render(copied)
    path = copied.run.folder / file
    if not path.exists():
        (path,) = copied.run.folder.glob(f"{file.rsplit('/', 1)[0]}/**/{path.name}")
    change(path, keys, value)
    after = render(copied)
    assert after != before
    if shown is not None:
        assert shown in after and shown not in before


def test_a_child_that_loses_context_is_warned_of_first(copied):
    path = copied.child.folder / "evaluate" / "results.json"
    curve = json.loads(path.read_text())["uptrained"]["by_position"]
    growth = {"value": 3.2, "low": 2.8, "high": 3.6}
    change(path, ["uptrained", "by_position", "growth"], growth)
    html = render(copied)
    header = html[html.index("<header") : html.index("</header")]
    assert "3.2 times (2.8 times to 3.6 times) as much" in header
    assert f"{curve['ends'][-1]:,}" in header
    change(path, ["uptrained", "by_position", "growth"], {"value": 1.2, "low": 0.9, "high": 1.5})
    assert 'class="warning"' not in render(copied)


def test_the_closing_table_fits_80_columns_and_leads_with_the_answer(copied, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = copied.child.folder / "evaluate" / "results.json"
    change(path, ["uptrained", "retention"], LEAST_RETENTION)
    results = evaluation.read(copied)
    print_results(copied, results, page_path(copied))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{results.speedup:.2f}x the parent's throughput, modelled")
    assert "87.7% of its top-1 accuracy kept (83.2% to 91.2%)" in lines[1]
    head = next(i for i, line in enumerate(lines) if "uptrained" in line)
    table = lines[head : head + 2 + len(rows(results))]
    assert max(map(len, table)) <= 80
    for row in rows(results):
        assert any(row.name in line and row.uptrained in line for line in table)
    assert any(line.startswith("report    ") and "index.html" in line for line in lines)
    assert any(f"puzzle serve {copied.run.folder}" in line for line in lines)


def test_children_are_compared_on_a_page(copied):
    other = copied.run.folder / "children" / "other <i>"
    shutil.copytree(copied.child.folder, other.with_name("other"))
    for name in ("main", "other"):
        path = copied.run.folder / "children" / name / "evaluate" / "results.json"
        change(path, ["uptrained", "retention"], LEAST_RETENTION)
    found = summaries([copied.run])
    html = compare.write(copied.run, found).read_text()
    assert "87.7" in html and "other" in html and html.count('class="mark"') == 3
    assert (copied.run.folder / "compare" / "index.html").exists()
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", html)


def test_names_and_texts_are_escaped(copied):
    recipe = copied.run.recipe.model_copy(update={"parent": "</script><script>alert(1)</script>"})
    run = Run(recipe, copied.run.folder, copied.run.progress)
    run.__dict__["parent"] = copied.run.parent
    html = render(run.child_job("main"))
    assert "<script>alert" not in html
    data = html[html.index('id="data">') :]
    data = data[len('id="data">') : data.index("</script>")]
    layers = json.loads(data)["layers"]
    assert [layer["chosen"] for layer in layers] == evaluation.read(copied).architecture


def test_a_point_of_the_frontier_is_made_by_the_command_that_its_report_shows(copied):
    from typer.testing import CliRunner

    from puzzle.cli import app

    html = render(copied)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    number, point = list(data["frontier"].items())[-1]
    words = point["command"].split()
    assert words[:2] == ["puzzle", "child"] and words[-4:] == ["--solution", number, "--of", "main"]
    words = [word.replace("NAME", "edge") for word in words[1:]]
    result = CliRunner().invoke(app, [*words, "--quiet", "--set", "uptrain.tokens=512"])
    assert result.exit_code == 0, result.output
    made = artifacts.read_object(copied.run.folder / "children/edge/search/solutions.json")
    assert made["solutions"][0]["blocks"] == point["blocks"]


def test_a_number_beyond_the_frontier_is_refused(copied):
    from puzzle.commands.children import _with_solution
    from puzzle.errors import UserError

    wish = copied.run.child_config("main")
    with pytest.raises(UserError, match="--solution: got 999, but child main has only"):
        _with_solution(copied.run, "edge", wish, 999, "main", ())


def test_every_key_of_the_results_is_documented(job):
    documented = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    words = set(re.findall(r"[a-z0-9_]+", documented))

    def keys(value, inside=""):
        if isinstance(value, dict):
            for key, one in value.items():
                if inside not in ("shape", "sheet", "scenarios"):  # named by users and by families
                    yield key
                yield from keys(one, key)
        elif isinstance(value, list):
            for one in value:
                yield from keys(one)

    results = evaluation.read(job).as_json()
    assert set(keys(results)) - words == set()
