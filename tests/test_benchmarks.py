"""Every benchmark runs: `--quick` ends well, and the last line of `--json` is JSON."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puzzle.evaluate import results as evaluation
from puzzle.report import table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
NO_BENCHMARKS = {
    "baselines.py",
    "common.py",
    "contest.py",
    "pytest_forks.py",
    "readme.py",
    "standings.py",
    "wishes.py",
}
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name not in NO_BENCHMARKS)
FASTEST = {"attention.py", "bld.py", "parent_size.py"}  # the others start several processes
OPTIONS = {"gpu.py": ["--device", "cpu"]}
pytestmark = pytest.mark.training


def benchmark(path: Path):
    marks = () if path.name in FASTEST else (pytest.mark.slow,)
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("script", map(benchmark, SCRIPTS))
def test_a_quick_run_ends_with_json(script, tmp_path):
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    out = subprocess.run(
        [sys.executable, str(script), "--quick", "--json", *OPTIONS.get(script.name, [])],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # nothing depends on where it is started
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=600,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    lines = out.stdout.splitlines()
    assert "quick run" in lines[1]
    assert any(line.startswith("| ---") for line in lines) or script.name == "kill.py"
    assert json.loads(lines[-1])
    assert not list(tmp_path.iterdir()), "a quick run left files where it was started"


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_a_benchmark_says_how_it_is_used(script):
    text = script.read_text(encoding="utf-8")
    usage = text.split('"""')[1]
    assert f"python benchmarks/{script.name}" in usage
    assert "--quick" in usage and "--json" in usage


def test_the_readme_gets_the_figures_of_a_run(finished_run, tmp_path):
    job = finished_run.child_job("main")
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(before, encoding="utf-8")
    section = runpy.run_path(str(FOLDER / "readme.py"))["update"](job, tmp_path)
    begin, end = "<!-- result:begin -->\n", "<!-- result:end -->"
    around = (before.split(begin)[0], before.split(end)[1])
    after = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert after == f"{around[0]}{begin}{section}\n{end}{around[1]}"
    assert (tmp_path / "docs" / "images" / "architecture.svg").read_text().startswith("<")
    results = evaluation.read(job)
    for row in table.rows(results):
        assert f"| {' | '.join(row)} |" in section.splitlines()
    promise = results.served.promises[0]
    assert f"asked {promise.asked}, measured {promise.measured}" in section
    for stage in ("library", "score", "cost", "search", "assemble", "uptrain", "evaluate"):
        assert f"{stage} " in section.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_is_one_line():
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    out = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), "library"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert out.returncode == 2
    (line,) = out.stdout.splitlines()
    assert "there is no GPU to measure on" in line
