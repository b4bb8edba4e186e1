"""Put the table, the architecture and the times of a real run into README.md, between its markers.

    make demo                             # or any other run that is finished
    python benchmarks/readme.py runs/pocket

Nothing in the README's result section is typed by hand. Not a benchmark: it measures nothing, but
writes README.md (what stands between `<!-- result:begin -->` and `<!-- result:end -->`) and
docs/images/architecture.svg, and prints the section. Where there is a Chromium (`chromium`, or what
`PUZZLE_CHROMIUM` names) and the package playwright, docs/images/report.png becomes the first screen
of the run's page.
"""

import argparse
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from puzzle.artifacts import write_text
from puzzle.evaluate import results as evaluation
from puzzle.progress import Progress, duration
from puzzle.report import REPORT, table
from puzzle.report.stage import stage_seconds
from puzzle.run import Run
from puzzle.stage import Job

SECTION = re.compile(r"(<!-- result:begin -->\n).*?(<!-- result:end -->)", re.DOTALL)


def result_section(job: Job) -> str:
    """The table of a finished child, and a line on how it was measured."""
    results = evaluation.read(job)
    lines = ["| | parent | child | uptrained |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows(results)]
    engine, dtype = results.costs.engine, results.costs.scenarios["main"].dtype
    promises = "; ".join(f"asked {p.asked}, measured {p.measured}" for p in results.served.promises)
    stages = stage_seconds(job)
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items())
    lines += [
        "",
        f"{engine.engine} {engine.version} on {engine.count} cores of {engine.device}, {dtype}, "
        f"{job.place.cost.scenario}; quality on {results.evaluated_tokens:,} tokens of test text. "
        f"{promises}. Time: {duration(sum(stages.values()))} ({times}).",
    ]
    return "\n".join(lines)


def update(job: Job, root: Path) -> str:
    """Write the section and the picture into the repository at `root`; returns the section."""
    section = result_section(job)
    picture = (job.folder(REPORT) / "architecture.svg").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = SECTION.sub(lambda markers: f"{markers[1]}{section}\n{markers[2]}", readme)
    write_text(root / "docs" / "images" / "architecture.svg", picture)
    write_text(root / "README.md", readme)
    return section


def screenshot(job: Job, root: Path) -> str:
    """Take a picture of the page's first screen; returns what was done."""
    chromium = os.environ.get("PUZZLE_CHROMIUM") or shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        return "no screenshot: chromium and playwright are not both here"
    from playwright.sync_api import sync_playwright

    path = root / "docs" / "images" / "report.png"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 560})
        page.goto((job.folder(REPORT) / "index.html").resolve().as_uri())
        page.screenshot(path=path)
        browser.close()
    return f"screenshot: {path}"


def main() -> None:
    """Update this repository's README from the run on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    run = Run.open(parser.parse_args().run, Progress(quiet=True))
    job, root = run.child_job("main"), Path(__file__).parent.parent
    print(update(job, root))
    print(screenshot(job, root))


if __name__ == "__main__":
    main()
