"""Kill `puzzle run` with SIGKILL at spread moments; the finished run must have bit-identical child
weights.

    python benchmarks/kill.py [--kills 10] [--json] [--quick]

First an uninterrupted run, then a second one that is killed `--kills` times, evenly spread over the
seconds the first one took, and started again each time. Both use the same cost table: measuring
twice would give two tables, and different costs may rightly lead to different children. `--quick`
uses modelled costs and few tokens.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICK = [
    "library.tokens=65536",
    "uptrain.tokens=65536",
    "score.sequences=8",
    "evaluate.sequences=16",
    "cost.engine=roofline",
]


def command(out: Path, settings: list[str]) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "puzzle.cli", "run", "pocket", "--out", str(out), *sets]


def weights(out: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()[:16]
        for name in ("child", "uptrained")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    settings = (QUICK if args.quick else []) + args.set
    root = Path(tempfile.mkdtemp(prefix="puzzle-kill-"))
    whole, killed = root / "whole", root / "killed"
    began = time.perf_counter()
    with (root / "whole.log").open("w") as log:
        subprocess.run(command(whole, settings), check=True, stdout=log, stderr=log)
    seconds = time.perf_counter() - began
    print(f"uninterrupted: {seconds:.0f} s; {weights(whole)}", flush=True)
    if "cost.engine=roofline" not in settings:
        settings.append(f"cost.table={whole / 'cost' / 'costs.jsonl'}")
    spent, moments = 0.0, []
    with (root / "killed.log").open("w") as log:
        for index in range(args.kills):
            process = subprocess.Popen(command(killed, settings), stdout=log, stderr=log)
            began = time.perf_counter()
            # long enough to get past the start, and another place in the work each time
            time.sleep(seconds * (index + 1) / (args.kills + 1) / 3 + 5 + 0.37 * index)
            alive = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            spent += time.perf_counter() - began
            status = killed / "status.json"
            stages = json.loads(status.read_text()) if status.exists() else {}
            running = next(
                (name for name, s in stages.items() if s["state"] == "running"),
                "corpus or between stages",
            )
            moments.append(running if alive else "finished already")
            print(f"kill {index + 1} after {spent:.0f} s in all: {moments[-1]}", flush=True)
        subprocess.run(command(killed, settings), check=True, stdout=log, stderr=log)
    same = weights(killed) == weights(whole)
    print(f"killed and resumed: {weights(killed)}\nbit-identical: {same}")
    if args.json:
        print(json.dumps({"identical": same, "kills": moments, "uninterrupted_s": seconds}))
    shutil.rmtree(root)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
