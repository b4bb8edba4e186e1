"""What several processes gain, and what they send: one process against two, one thread each.

    python benchmarks/ranks.py [--json] [--quick]

A parent of random weights; library, scores, uptraining and evaluation (quality, without serving) of
one run, each stage by a group of one process and by a group of two. Seconds are from when all have
joined to when all are done, without the start of the interpreters. On a busy machine the ratio of
seconds says little; beside it stands that of the seconds that the busiest process computes, in
which waiting for one another is not seen. Bytes are those of the loopback interface of a network
namespace of the benchmark's own (`unshare`), or missing where that is not allowed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

from puzzle import artifacts, pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.device import keep_freed_memory
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH
from puzzle.stage import Job, Scope, Stage
from puzzle.training import launch, sharding
from puzzle.uptrain import UPTRAIN

SIZES = common.LlamaSizes(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
)
RECIPE = {
    "precision": "float32",
    "deploy": ["transformers"],
    "corpus": {
        "sequence_length": 128,
        "train_tokens": 200_000,
        "held_out_fraction": 0.2,
        "held_out_tokens": 65_536,
    },
    "library": {
        "kv_heads": [1],
        "ffn_percent": [75, 50, 25],
        "tokens": 16_384,
        "batch_sequences": 8,
        "chunk_steps": 4,
        "validation_sequences": 8,
        "calibration_sequences": 16,
    },
    "score": {"sequences": 8, "shard_sequences": 2, "assembled": 0},
    "cost": {"engine": "roofline"},
    "search": {"parameters": "75%", "refinements": 0},
    "uptrain": {"tokens": 16_384, "batch_sequences": 8, "validate_steps": 8},
    "evaluate": {"sequences": 32, "context": 128, "questions": 4, "samples": 1},
}
STAGES = {stage.name: stage for stage in (LIBRARY, SCORE, UPTRAIN, EVALUATE)}
NAMESPACE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def job_of(run: Run, stage: Stage) -> Job:
    """What a stage works on."""
    return Job(run) if stage.scope is Scope.RUN else run.child_job("main")


def loopback_bytes() -> int:
    """Received by the loopback interface so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.split(":")[0].strip() == "lo").split()[1])


def work(folder: str, name: str, out: str) -> None:
    """In every process of a group: do the stage; process 0 writes what it took."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with launch.group():
        run = Run.open(Path(folder), Progress(quiet=True))
        stage = STAGES[name]
        job = job_of(run, stage)
        _ = run.corpus
        stage.work()
        sharding.barrier()
        began, cpu, before = time.perf_counter(), time.process_time(), loopback_bytes()
        stage.work().execute(job, job.folder(stage))
        computed_s = sharding.all_of(time.process_time() - cpu)
        sharding.barrier()
        figures = {
            "seconds": time.perf_counter() - began,
            "computed_s": max(computed_s),
            "bytes": loopback_bytes() - before,
        }
        if sharding.rank() == 0:
            Path(out).write_text(json.dumps(figures))
    sharding.leave(0)


@dataclass(frozen=True)
class Group:
    """So many processes that do stages of a run."""

    processes: int
    is_apart: bool  # in a network namespace of their own

    def do(self, run: Run, name: str) -> dict[str, float]:
        """What a stage took, which is closed then."""
        stage = STAGES[name]
        job = job_of(run, stage)
        if stage is UPTRAIN:
            for earlier in (COST, SEARCH, ASSEMBLE):
                pipeline.execute_stage(earlier, job)
        artifacts.begin(job.folder(stage), stage.inputs(job))
        out = run.folder / f"{name}-{self.processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"]
        command += ["--nproc-per-node", str(self.processes), "--master-addr", "127.0.0.1"]
        command += [__file__, common.WORKER, str(run.folder), name, str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if self.is_apart:
            command = [*NAMESPACE, *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        pipeline.execute_stage(stage, job)
        figures: dict[str, float] = json.loads(out.read_text())
        return figures


def can_be_apart() -> bool:
    """Whether this user may have a network namespace."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def measure(recipe: common.Settings, root: Path) -> list[dict[str, Any]]:
    """Every stage by one process and by two."""
    is_apart, rows = can_be_apart(), []
    common.print_header("stage", "1 process", "2 processes", "ratio", "computed", "sent by 2")
    runs = {n: common.open_run(root / str(n), recipe) for n in (1, 2)}
    for run in runs.values():
        run.write()
        _ = run.corpus
    for name in STAGES:
        took = {n: Group(n, is_apart).do(run, name) for n, run in runs.items()}
        row: dict[str, Any] = {"stage": name}
        for key in ("seconds", "computed_s"):
            row[key] = [took[n][key] for n in runs]
            row[f"{key}_ratio"] = took[1][key] / took[2][key]
        row["bytes"] = took[2]["bytes"] if is_apart else None
        rows.append(row)
        sent = f"{took[2]['bytes'] / 1e6:.1f} MB" if is_apart else "unknown"
        seconds = [f"{took[n]['seconds']:.1f} s" for n in runs]
        ratios = [f"{row[f'{key}_ratio']:.2f}x" for key in ("seconds", "computed_s")]
        common.print_row(name, *seconds, *ratios, sent)
    return rows


def main() -> None:
    """Measure, or be one of the processes."""
    arguments = common.worker_arguments()
    if arguments is not None:
        work(*arguments)
        return
    args = common.start(common.parser(__doc__, quick="a parent of 3 layers of width 128"))
    with tempfile.TemporaryDirectory() as root:
        if args.quick:
            recipe = common.tiny_recipe(Path(root))
        else:
            common.make_parent(Path(root) / "parent", SIZES)
            recipe = RECIPE | {"parent": str(Path(root) / "parent")}
        rows = measure(recipe, Path(root))
    common.print_json(args, {"stages": rows})


if __name__ == "__main__":
    main()
