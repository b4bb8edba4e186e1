"""Kill `puzzle run` with SIGKILL at spread moments; the finished run must have bit-identical child
weights.

    python benchmarks/kill.py [--kills 10] [--set KEY=VALUE ...] [--json] [--quick]

First an uninterrupted run, then a second one that is killed `--kills` times, evenly spread over the
seconds the first one took, and started again each time. Both use the same cost table: measuring
twice would give two tables, and different costs may rightly lead to different children.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common

from puzzle import artifacts, pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.cost.table import COSTS
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.uptrain import UPTRAIN

LEAST_S = 5.0  # before a kill: enough to import everything and get to work


@dataclass(frozen=True)
class Command:
    """`puzzle run` with its settings. What it prints goes to a file beside the run directory."""

    recipe: str
    out: Path
    settings: list[str]

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; it goes on with what is in its directory."""
        words = [sys.executable, "-m", "puzzle.cli", "run", self.recipe, "--out", str(self.out)]
        words += [word for setting in self.settings for word in ("--set", setting)]
        with self.out.with_suffix(".log").open("a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log)

    def complete(self) -> float:
        """Run it to the end; the seconds it took. Ends this process where it fails."""
        began = time.perf_counter()
        if self.start().wait():
            sys.exit(self.out.with_suffix(".log").read_text()[-3000:])
        return time.perf_counter() - began


def weights(out: Path) -> dict[str, str]:
    """Fingerprints of the weights of a finished run's child, before and after uptraining."""
    job = Run.open(out, Progress(quiet=True)).child_job("main")
    return {
        stage.folder: artifacts.file_fingerprint(job.folder(stage) / "model.safetensors")
        for stage in (ASSEMBLE, UPTRAIN)
    }


def unfinished_stage(out: Path) -> str:
    """The stage that an interrupted run was in, from its folders."""
    try:
        stages = pipeline.status(Run.open(out, Progress(quiet=True)))
    except UserError:  # not even run.yaml is there
        return "start"
    names = [stage.stage for stage in stages if stage.state == "unfinished"]
    return names[0] if names else "corpus or between stages"


def kill_often(command: Command, kills: int, seconds: float) -> list[str]:
    """Start and kill; the stage of every kill. `seconds`: of an uninterrupted run."""
    spent_s, moments = 0.0, []
    for index in range(kills):
        process = command.start()
        began = time.perf_counter()
        # every time at another point of the work
        time.sleep(seconds * (index + 1) / (kills + 1) / 3 + LEAST_S + 0.37 * index)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        spent_s += time.perf_counter() - began
        moments.append(unfinished_stage(command.out) if alive else "finished already")
        print(f"kill {index + 1} after {spent_s:.0f} s in all: {moments[-1]}", flush=True)
    return moments


def measure(root: Path, args: argparse.Namespace) -> dict[str, object]:
    """Both runs, and whether their children are the same."""
    recipe, settings = "pocket", list(args.set)
    if args.quick:
        recipe = str(root / "recipe.yaml")
        (root / "recipe.yaml").write_text(json.dumps(common.tiny_recipe(root)))  # JSON is YAML
    uninterrupted = Command(recipe, root / "uninterrupted", settings)
    seconds = uninterrupted.complete()
    expected = weights(uninterrupted.out)
    print(f"uninterrupted: {seconds:.0f} s; {expected}", flush=True)
    place = Run.open(uninterrupted.out, Progress(quiet=True)).place_job()
    if place.engine.measured:
        settings = [*settings, f"cost.table={place.folder(COST) / COSTS}"]
    killed = Command(recipe, root / "killed", settings)
    moments = kill_often(killed, 1 if args.quick else args.kills, seconds)
    killed.complete()
    resumed = weights(killed.out)
    identical = resumed == expected
    print(f"killed and resumed: {resumed}\nbit-identical: {identical}")
    return {"identical": identical, "kills": moments, "uninterrupted_s": seconds}


def main() -> None:
    """Exit code 0 where the children are the same, 1 where they differ."""
    parser = common.parser(__doc__, quick="a tiny parent, modelled costs, one kill")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = common.start(parser)
    with tempfile.TemporaryDirectory(prefix="puzzle-kill-") as root:
        figures = measure(Path(root), args)
    common.print_json(args, figures)
    sys.exit(0 if figures["identical"] else 1)


if __name__ == "__main__":
    main()
