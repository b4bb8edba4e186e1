"""What one library gives: a run's children side by side, as a table and a picture for README.md.

    puzzle run pocket-wishes              # three children of one library
    python benchmarks/wishes.py runs/pocket-wishes

After `make demo`, `puzzle run pocket-wishes --out runs/pocket` reuses its library, scores and
costs. Nothing in the README's section is typed by hand. Not a benchmark: it measures nothing, but
writes README.md (what stands between `<!-- wishes:begin -->` and `<!-- wishes:end -->`) and
docs/images/wishes.svg, and prints the section.
"""

import argparse
import re
from pathlib import Path

from puzzle.artifacts import write_text
from puzzle.commands.summary import ChildSummary, summarise
from puzzle.evaluate import results as evaluation
from puzzle.progress import Progress, duration
from puzzle.report import charts, strip
from puzzle.report.stage import stage_seconds
from puzzle.run import Run
from puzzle.stage import Job

SECTION = re.compile(r"(<!-- wishes:begin -->\n).*?(<!-- wishes:end -->)", re.DOTALL)
OF_THE_CHILD = ("search", "assemble", "uptrain", "evaluate")


def row(child: ChildSummary, seconds: float) -> str:
    """One child as a line of the table."""
    cells = [
        child.child,
        child.wish,
        f"{child.predicted_speedup:.2f}x",
        f"{child.measured_speedup:.2f}x",
        child.verdict or "",
        f"{child.parameters:,}",
        f"{child.kl:.4f}",
        f"{child.retention.value:.1%}" if child.retention else "",
        duration(seconds),
    ]
    return f"| {' | '.join(cells)} |"


def section(jobs: list[Job]) -> str:
    """The table of the children, and what the shared part took."""
    names = ["child", "asked", "predicted", "measured", "", "parameters", "KL", "kept of top-1"]
    lines = [f"| {' | '.join([*names, 'its own time'])} |", "| --- |" + " ---: |" * len(names)]
    for job in jobs:
        seconds = stage_seconds(job)
        lines.append(row(summarise(job), sum(seconds[name] for name in OF_THE_CHILD)))
    seconds = stage_seconds(jobs[0])
    shared = {name: seconds[name] for name in ("library", "score", "cost")}
    engine = evaluation.read(jobs[0]).costs.engine
    lines += [
        "",
        "![three children of one library](docs/images/wishes.svg)",
        "",
        f"{engine.engine} {engine.version} on {engine.count} cores of {engine.device}; library, "
        f"scores and costs, made once for all of them: {duration(sum(shared.values()))}.",
    ]
    return "\n".join(lines)


def picture(jobs: list[Job]) -> str:
    """The architecture of each child, under what it is worth."""
    shown = []
    for job in jobs:
        results = evaluation.read(job)
        retention = results.uptrained.retention
        kept = 0.0 if retention is None else retention.value
        title = f"{job.child.name}: {results.speedup:.2f}x, keeps {kept:.1%} of top-1"
        shown.append((title, strip.architecture(title, results.blocks, job.run.parent.shape)))
    return charts.standalone(charts.stack(shown))


def main() -> None:
    """Update this repository's README from the run on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    parser.add_argument("--children", nargs="+", help="which, in this order; default: all")
    arguments = parser.parse_args()
    run = Run.open(arguments.run, Progress(quiet=True))
    jobs = [run.child_job(name) for name in arguments.children or run.child_names()]
    root = Path(__file__).parents[1]
    text = section(jobs)
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = SECTION.sub(lambda markers: f"{markers[1]}{text}\n{markers[2]}", readme)
    write_text(root / "docs" / "images" / "wishes.svg", picture(jobs))
    write_text(root / "README.md", readme)
    print(text)


if __name__ == "__main__":
    main()
