"""Uptraining: memory and time of the loss, and the paper's table of losses at pocket scale.

    python benchmarks/uptrain.py [--json] [--bfloat16]
    python benchmarks/uptrain.py --mixes RUN [--tokens N] [--seeds 3] [--out DIR] [--json]
    python benchmarks/uptrain.py --quick [--json]           # both, on tiny models

The loss: KL and LM loss of 4096 tokens of width 2048 over a vocabulary of 128,256, value and
gradients of hidden states and head, against the plain implementation (all logits at once, torch's
own functions). Memory: each in a process of its own, the peak resident set above the one with its
inputs made; so everything that is allocated counts, the head's gradient included. Time: those
processes, in turn, three of each; medians.

The table (`--mixes`): the child of a finished run is uptrained with the eight mixes of LM loss, KL
and cosine, the same tokens for all, once for every seed (which decides the order of the data).
Held-out KL, LM loss and accuracy. What is done is kept in --out: the same command goes on.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F

from puzzle import artifacts, pipeline
from puzzle.artifacts import Record
from puzzle.assemble import ASSEMBLE
from puzzle.config import UptrainConfig
from puzzle.cost import COST
from puzzle.device import keep_freed_memory
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.library import LIBRARY
from puzzle.metrics import Metrics
from puzzle.model import child
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH
from puzzle.stage import Job
from puzzle.training import losses
from puzzle.uptrain.stage import distil

SETTINGS = losses.LogitLoss(kl_weight=1.0, lm_weight=1.0)  # both terms: the case with the most work

# --------------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class LossSizes:
    """What the loss is measured on."""

    tokens: int
    width: int
    vocabulary: int


FULL, QUICK = LossSizes(4096, 2048, 128_256), LossSizes(64, 128, 4096)


def plain(
    child_TD: torch.Tensor,
    head_VD: torch.Tensor,
    parent_TD: torch.Tensor,
    parent_head_VD: torch.Tensor,
    targets_T: torch.Tensor,
) -> torch.Tensor:
    """The loss as one would write it first."""
    logits_TV = child_TD @ head_VD.T
    with torch.no_grad():
        target_TV = parent_TD @ parent_head_VD.T
    log_q_TV, log_p_TV = F.log_softmax(logits_TV.float(), -1), F.log_softmax(target_TV.float(), -1)
    kl = F.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="batchmean")
    return SETTINGS.kl_weight * kl + SETTINGS.lm_weight * F.nll_loss(log_q_TV, targets_T)


def chunked(*sides: torch.Tensor) -> torch.Tensor:
    """Ours, of the same arguments."""
    return losses.distillation_losses(*sides, SETTINGS)[0]


def measure_loss(name: str, tokens: int, width: int, vocabulary: int, bfloat16: bool) -> None:
    """In a process of its own: print bytes above the inputs, seconds, value, gradient norms."""
    keep_freed_memory()
    torch.manual_seed(0)
    child_TD = torch.randn(tokens, width).requires_grad_()
    head_VD = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    parent_TD = child_TD.detach() + 0.3 * torch.randn(tokens, width)
    parent_head_VD = head_VD.detach().clone()
    targets_T = torch.randint(vocabulary, (tokens,))
    function = {"plain": plain, "chunked": chunked}[name]
    before, began = common.peak_bytes(), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = function(child_TD, head_VD, parent_TD, parent_head_VD, targets_T)
    loss.backward()
    figures = {
        "seconds": time.perf_counter() - began,
        "bytes": common.peak_bytes() - before,
        "loss": loss.item(),
        "gradients": [child_TD.grad.norm().item(), head_VD.grad.norm().item()],
    }
    print(json.dumps(figures))


def compare_losses(sizes: LossSizes, bfloat16: bool, rounds: int) -> dict[str, Any]:
    """Both implementations in turn; prints the table."""
    measured: dict[str, list[dict[str, Any]]] = {"plain": [], "chunked": []}
    for _ in range(rounds):
        for name, results in measured.items():
            words = (name, sizes.tokens, sizes.width, sizes.vocabulary, int(bfloat16))
            results.append(common.in_own_process(__file__, *words))
    dtype = "bfloat16 products" if bfloat16 else "float32"
    print(f"{sizes.tokens} tokens, width {sizes.width}, vocabulary {sizes.vocabulary:,}, {dtype}")
    common.print_header("", "peak above the inputs", "median seconds", "loss", "gradient norms")
    rows = {}
    for name, results in measured.items():
        seconds = [result["seconds"] for result in results]
        row = results[-1] | {"seconds": seconds, "median_s": statistics.median(seconds)}
        rows[name] = row
        norms = ", ".join(f"{norm:.6g}" for norm in row["gradients"])
        figures = (f"{row['bytes'] / 1e9:.2f} GB", f"{row['median_s']:.2f}", f"{row['loss']:.6f}")
        common.print_row(name, *figures, norms)
    ours, theirs = rows["chunked"], rows["plain"]
    memory, duration = ours["bytes"] / theirs["bytes"], ours["median_s"] / theirs["median_s"]
    print(f"memory 1/{1 / memory:.1f}, time {duration:.2f}x of plain torch", flush=True)
    ratios = {"memory": memory, "time": duration}
    return {"tokens": sizes.tokens, "dtype": dtype, **rows, "ratios": ratios}


# -------------------------------------------------------------------------------------- the mixes

MIXES = {  # the paper's table: its validation KL at about 5B tokens
    "none": 0.19,
    "LM": 0.31,
    "LM+KLD": 0.14,
    "KLD": 0.10,
    "LM+cos": 0.30,
    "cos": 0.16,
    "LM+cos+KLD": 0.14,
    "cos+KLD": 0.11,
}
FINDINGS = [  # (what the paper found, figure, the better mix, the worse mix)
    ("LM alone is worse than no uptraining", "kl", "none", "LM"),
    ("KLD alone improves", "kl", "KLD", "none"),
    ("cosine alone improves", "kl", "cos", "none"),
    ("LM hurts KLD", "kl", "KLD", "LM+KLD"),
    ("LM hurts cosine", "kl", "cos", "LM+cos"),
    ("LM hurts cosine + KLD", "kl", "cos+KLD", "LM+cos+KLD"),
    ("KLD alone has the lowest KL", "kl", "KLD", "cos+KLD"),
    ("cosine + KLD is the most accurate: more than KLD", "top1", "cos+KLD", "KLD"),
    ("cosine + KLD is the most accurate: more than all three", "top1", "cos+KLD", "LM+cos+KLD"),
]


class MixResult(Record):
    """One line of `results.jsonl`: a mix with one order of the data."""

    mix: str
    seed: int
    tokens: int  # 0 without uptraining, which has one seed
    quality: dict[str, float]  # means per token, by metric
    seconds: float


@dataclass(frozen=True)
class Mixes:
    """The finished run whose child is uptrained, and where results are kept."""

    run: Run
    out: Path
    tokens: int
    seeds: int

    def measure(self) -> list[MixResult]:
        """Every mix with every seed that has no result yet; all results of these tokens."""
        path = self.out / "results.jsonl"
        for seed in range(1, self.seeds + 1):
            for mix in MIXES:
                key = (mix, 1, 0) if mix == "none" else (mix, seed, self.tokens)
                rows = artifacts.read_records(path, MixResult)
                if key in {(row.mix, row.seed, row.tokens) for row in rows}:
                    continue
                began = time.perf_counter()
                figures = self._measure_mix(*key)
                seconds = time.perf_counter() - began
                row = MixResult(
                    mix=mix, seed=key[1], tokens=key[2], quality=figures, seconds=seconds
                )
                artifacts.append_record(path, row)
                print(f"{mix}, seed {key[1]}: KL {figures['kl']:.4f}, {seconds:.0f} s", flush=True)
        rows = artifacts.read_records(path, MixResult)
        return [row for row in rows if row.tokens in (0, self.tokens) and row.seed <= self.seeds]

    def _measure_mix(self, mix: str, seed: int, tokens: int) -> dict[str, float]:
        """Uptrain the child with one mix and measure it.

        The last weights are taken, so that nothing is selected by its KL.
        """
        settings = self.run.child_config("main")
        job = self.run.child_job("main")
        folder = job.folder(ASSEMBLE)
        if mix != "none":
            uptrain = _with_mix(settings.uptrain, mix, seed, tokens)
            job = self.run.job_of("main", settings.model_copy(update={"uptrain": uptrain}))
            folder = self.out / f"{mix}-{seed}-{tokens}"
            if not (folder / "config.json").exists():  # it comes last
                distil(job, folder)
            shutil.rmtree(folder / artifacts.UNFINISHED, ignore_errors=True)
        device, attention = self.run.device.torch_device, self.run.placement.attention
        model = child.load(folder, torch.float32, device, attention)
        text = Text.of(self.run, "validation", settings.evaluate.sequences)
        sums = unit_sums(self.run, model, text, settings.evaluate.batch_sequences)
        return {metric: sums.mean(metric).value for metric in sums.metrics}


def _with_mix(settings: UptrainConfig, mix: str, seed: int, tokens: int) -> UptrainConfig:
    terms = mix.split("+")
    changes = {
        "lm_weight": float("LM" in terms),
        "kl_weight": float("KLD" in terms),
        "cosine_weight": float("cos" in terms),
        "tokens": tokens,
        "seed": seed,
        "keep": "last",
        "stages": [],
        "patience": 0,
    }
    return UptrainConfig.model_validate(settings.model_dump() | changes)


def print_mixes(rows: list[MixResult], tokens: int, seeds: int) -> None:
    """Means and standard deviations over seeds beside the paper's, then the paper's findings."""
    print(f"\n{tokens:,} tokens, {seeds} seeds; mean and standard deviation over seeds")
    common.print_header(
        "mix", "KL(parent || child)", "the paper's", "LM loss", "top-1 token accuracy"
    )
    by_mix = {mix: {row.seed: row.quality for row in rows if row.mix == mix} for mix in MIXES}
    for mix, by_seed in by_mix.items():
        qualities = list(by_seed.values())
        kl = _mean_and_spread([q["kl"] for q in qualities], ".4f")
        lm_loss = _mean_and_spread([q["lm_loss"] for q in qualities], ".4f")
        top1 = _mean_and_spread([q["top1"] for q in qualities], ".2%")
        common.print_row(mix, kl, f"{MIXES[mix]:.2f}", lm_loss, top1)
    print()
    common.print_header(
        "the paper's finding", "difference here, mean (± standard error)", "reproduces"
    )
    for finding, figure, better, worse in FINDINGS:
        sign = 1 if figure == "kl" else -1
        gaps = []
        for seed in range(1, seeds + 1):
            # the child before uptraining has no seed: its only result is under 1
            good, bad = (by_mix[mix].get(seed, by_mix[mix][1]) for mix in (better, worse))
            gaps.append(sign * (bad[figure] - good[figure]))
        common.print_row(f"{finding} ({figure})", *_judge(gaps))


def _mean_and_spread(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _judge(gaps: list[float]) -> tuple[str, str]:
    """(mean and standard error, whether the finding reproduces); positive gaps agree with it."""
    mean = statistics.mean(gaps)
    if len(gaps) == 1:
        return f"{mean:+.4f}", "too close to call"
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    word = "too close to call"
    if abs(mean) > 2 * error:
        word = "yes" if mean > 0 else "NO, the reverse"
    return f"{mean:+.4f} ± {error:.4f}", word


def measure_mixes(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The table of losses of a run whose child is assembled."""
    run.metrics = Metrics(args.out / "logs")  # the finished run's logs stay as they are
    rows = Mixes(run, args.out, args.tokens, args.seeds).measure()
    print_mixes(rows, args.tokens, args.seeds)
    return {"tokens": args.tokens, "seeds": args.seeds, "rows": [row.as_json() for row in rows]}


def make_tiny_run(root: Path) -> Run:
    """A run of a tiny parent up to the assembled child."""
    run = common.open_run(root / "run", common.tiny_recipe(root))
    job: Job = run.child_job("main")
    for stage in (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE):
        pipeline.execute_stage(stage, job)
    return run


def main() -> None:
    """The loss, or the mixes, or both of them quickly."""
    arguments = common.worker_arguments()
    if arguments is not None:
        name, *numbers = arguments
        tokens, width, vocabulary, bfloat16 = map(int, numbers)
        measure_loss(name, tokens, width, vocabulary, bool(bfloat16))
        return
    parser = common.parser(
        __doc__, quick="a small loss; the mixes on a tiny child, 512 tokens each"
    )
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16")
    parser.add_argument("--mixes", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--tokens", type=int, default=500_000, help="of each mix")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/mixes"))
    args = common.start(parser)
    if args.quick:
        figures = {"loss": compare_losses(QUICK, args.bfloat16, rounds=1)}
        with tempfile.TemporaryDirectory() as name:
            args.tokens, args.seeds, args.out = 512, 1, Path(name) / "mixes"
            figures["mixes"] = measure_mixes(make_tiny_run(Path(name)), args)
    elif args.mixes:
        figures = measure_mixes(Run.open(args.mixes, Progress()), args)
    else:
        figures = compare_losses(FULL, args.bfloat16, rounds=3)
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
