"""Put the table, the architecture and the times of a real run into README.md, between its markers.

    python benchmarks/readme.py RUN

Nothing in the README's result section is typed by hand.
"""

import argparse
import re
from pathlib import Path

from puzzle.artifacts import read_json, write_text
from puzzle.evaluate import stage as evaluate
from puzzle.progress import Progress, duration
from puzzle.run import Run

ROOT = Path(__file__).parent.parent


def result_section(run: Run) -> str:
    results, status = evaluate.read(run), read_json(run.folder / "status.json")
    engine = results["engine"]
    lines = ["| | parent | child | uptrained |", "| --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in evaluate.table(results)]
    scenario = run.recipe.cost.scenario
    stages = {
        name: record["seconds"]
        for name, record in status.items()
        if record.get("seconds") is not None
    }
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items())
    promises = "; ".join(
        f"asked {p['asked']}, measured {p['measured']}" for p in results["promises"]
    )
    lines += [
        "",
        f"{engine['engine']} {engine['version']} on {engine['count']} cores of {engine['device']}, {engine['dtype']}, "
        f"{scenario}; "
        f"quality on {results['evaluated_tokens']:,} held-out tokens. {promises}. "
        f"Time: {duration(sum(stages.values()))} ({times}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    run = Run.open(args.run, Progress(quiet=True))
    picture = (run.stage_folder("report") / "architecture.svg").read_text()
    write_text(ROOT / "docs" / "images" / "architecture.svg", picture)
    text = (ROOT / "README.md").read_text()
    marked = r"(<!-- result:begin -->\n).*?(<!-- result:end -->)"
    section = result_section(run)
    write_text(
        ROOT / "README.md",
        re.sub(marked, lambda m: m[1] + section + "\n" + m[2], text, flags=re.DOTALL),
    )
    print(section)


if __name__ == "__main__":
    main()
