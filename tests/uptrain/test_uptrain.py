import importlib.machinery
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from puzzle import artifacts, config, pipeline, plan
from puzzle.config import UptrainConfig
from puzzle.errors import UserError
from puzzle.evaluate import stage as evaluate
from puzzle.model import child
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.training import checkpoint
from puzzle.uptrain import gkd, trainer
from puzzle.uptrain import stage as uptrain

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def student(finished_run):
    return child.load(
        finished_run.stage_folder("assemble"), torch.float32, finished_run.device, "sdpa"
    )


def assembled(finished_run, folder: Path, **settings) -> Run:
    """A copy of a finished run, up to the assembled child, with other settings of uptraining."""
    shutil.copytree(
        finished_run.folder,
        folder,
        ignore=shutil.ignore_patterns("uptrained", "evaluate", "report"),
    )
    recipe = finished_run.recipe.model_dump(mode="json")
    recipe["uptrain"] |= settings
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write_recipe()
    return run


def uptrained(finished_run, folder: Path, **settings) -> Run:
    run = assembled(finished_run, folder, **settings)
    pipeline.execute_stage(run, "uptrain")
    return run


def curve(run: Run) -> list[dict]:
    return artifacts.read_jsonl(run.stage_folder("uptrain") / "curve.jsonl")


def weights(run: Run, stage: str = "uptrain") -> dict[str, torch.Tensor]:
    return load_file(run.stage_folder(stage) / "model.safetensors")


def assert_same_curve(ours: Run, theirs: Run, rel: float = 1e-4) -> None:
    assert len(curve(ours)) == len(curve(theirs)) > 0
    for a, b in zip(curve(ours), curve(theirs), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {
            k for k in a if "top" in k or "retention" in k
        }:  # counts of a few tokens jump
            assert a[key] == pytest.approx(b[key], rel=rel), (a["step"], key)


# ------------------------------------------------------------------------------------------- losses


def test_the_losses_equal_plain_torch(finished_run, student):
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    loss, terms = gkd.Pair(student, parent, UptrainConfig(lm_weight=0.5)).losses(tokens)
    cosine, kl, lm = terms
    with torch.no_grad():
        ours = student(tokens, use_cache=False, output_hidden_states=True)
        theirs = parent(tokens, use_cache=False, output_hidden_states=True)
    per_layer = [
        (1 - F.cosine_similarity(a, b, dim=-1)).mean()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    logits, target = (m.logits[:, :-1].flatten(0, 1) for m in (ours, theirs))
    plain_kl = F.kl_div(
        F.log_softmax(logits, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean"
    )
    assert cosine.item() == pytest.approx(sum(per_layer).item(), rel=1e-4)
    assert kl.item() == pytest.approx(plain_kl.item(), rel=1e-4)
    assert loss.item() == pytest.approx((cosine + kl + 0.5 * lm).item(), rel=1e-5)
    assert lm.item() == pytest.approx(
        F.cross_entropy(logits, tokens[:, 1:].flatten()).item(), rel=1e-4
    )


def test_a_student_equal_to_the_parent_has_nothing_to_learn(finished_run):
    parent, tokens = finished_run.parent_model, finished_run.corpus["train"].batch(3, 4)
    cosine, kl, _ = gkd.Pair(parent, parent, UptrainConfig()).losses(tokens)[1]
    assert cosine.item() == pytest.approx(0.0, abs=1e-5) and kl.item() == pytest.approx(
        0.0, abs=1e-5
    )


def test_terms_of_weight_zero_are_left_out_and_not_reported(finished_run, tmp_path):
    only_cosine = uptrained(finished_run, tmp_path / "cosine", kl_weight=0.0, tokens=512)
    assert {"cosine", "validation_kl"} <= curve(only_cosine)[-1].keys()
    assert not {"kl", "lm_loss"} & curve(only_cosine)[-1].keys()
    only_lm = uptrained(
        finished_run, tmp_path / "lm", kl_weight=0.0, cosine_weight=0.0, lm_weight=1.0, tokens=512
    )
    assert "lm_loss" in curve(only_lm)[-1] and not {"kl", "cosine"} & curve(only_lm)[-1].keys()


def test_validation_equals_the_evaluation_of_the_saved_child(finished_run):
    run, last = finished_run, curve(finished_run)[-1]
    model = child.load(run.stage_folder("uptrain"), torch.float32, run.device, run.attention)
    tokens = run.corpus["validation"].head(trainer.VALIDATION_SEQUENCES)
    found, parent = (
        evaluate.quality(run, model, tokens),
        evaluate.quality(run, run.parent_model, tokens),
    )
    for name, value in found.items():
        assert last[f"validation_{name}"] == pytest.approx(value, rel=1e-5), name
    assert last["validation_retention"] == pytest.approx(found["top1"] / parent["top1"])


def test_uptraining_brings_the_child_closer_to_the_parent(finished_run):
    models = evaluate.read(finished_run)["models"]
    assert models["uptrained"]["kl"] < models["child"]["kl"]
    assert models["parent"]["kl"] == pytest.approx(0.0, abs=1e-6)


# ----------------------------------------------------------------------------------------- the loop


def test_an_interrupted_uptraining_ends_bit_identical(finished_run, tmp_path, monkeypatch):
    run, real, calls = assembled(finished_run, tmp_path / "run"), gkd.Pair.losses, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gkd.Pair, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute_stage(run, "uptrain")
    monkeypatch.setattr(gkd.Pair, "losses", real)
    pipeline.execute_stage(run, "uptrain")
    names = "model.safetensors"
    ours, theirs = (r.stage_folder("uptrain") / names for r in (run, finished_run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_non_finite_step_is_skipped_and_counted(finished_run, tmp_path, monkeypatch):
    real, calls = gkd.Pair.losses, []

    def once_nan(*args):
        calls.append(1)
        loss, terms = real(*args)
        return loss * (float("nan") if len(calls) == 2 else 1.0), terms

    monkeypatch.setattr(gkd.Pair, "losses", once_nan)
    run = uptrained(finished_run, tmp_path / "run")
    assert curve(run)[-1]["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_micro_batches_add_up_to_the_whole_batch(finished_run, tmp_path):
    """Eight sequences as 3 + 3 + 2, their activations computed twice: the same run to float
    tolerance.
    """
    run = uptrained(
        finished_run, tmp_path / "run", micro_batch_sequences=3, activation_checkpointing=True
    )
    assert_same_curve(run, finished_run)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(finished_run)[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_keeps_less_for_the_backward_pass(finished_run):
    tokens, kept = finished_run.corpus["train"].batch(0, 4), []
    for checkpointing in (False, True):
        model = child.load(
            finished_run.stage_folder("assemble"), torch.float32, finished_run.device, "sdpa"
        ).train()
        settings, saved = UptrainConfig(activation_checkpointing=checkpointing), []
        pair = gkd.Pair(model, finished_run.parent_model, settings)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            pair(tokens)[0].backward()
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]


def test_schedules_warm_up_and_end_at_zero():
    wsd = [checkpoint.wsd_schedule(step, 100, 0.1, 0.2) for step in range(100)]
    assert wsd[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(wsd[10:80]) == {1.0}
    assert wsd[80:] == pytest.approx([(20 - i) / 20 for i in range(20)])
    cosine = [checkpoint.cosine_schedule(step, 100, 0.1) for step in range(100)]
    assert (
        cosine[9] == cosine[10] == 1.0
        and cosine[55] == pytest.approx(0.5, abs=1e-6)
        and 0 < cosine[99] < 1e-3
    )
    assert trainer.rate_factor(UptrainConfig(schedule="wsd"), 70, 100) == 1.0
    assert trainer.rate_factor(UptrainConfig(), 70, 100) == checkpoint.cosine_schedule(
        70, 100, 0.05
    )


def test_uptraining_stops_early_where_nothing_improves(finished_run, tmp_path):
    """A learning rate of nothing: the first validation is the best, two more are not better."""
    run = uptrained(
        finished_run, tmp_path / "run", learning_rate=1e-30, patience=2, validate_steps=1
    )
    assert [record["step"] for record in curve(run)] == [1, 2, 3]


RISING = {
    "learning_rate": 0.02,
    "warmup_share": 0.99,
}  # first it gets better, then the steps are too large


def test_the_best_weights_are_kept_or_the_last(finished_run, tmp_path):
    kept = {}
    for keep in ("best", "last"):
        run = uptrained(finished_run, tmp_path / keep, keep=keep, validate_steps=1, **RISING)
        seen = [record["validation_kl"] for record in curve(run)]
        model = child.load(run.stage_folder("uptrain"), torch.float32, run.device, run.attention)
        tokens = run.corpus["validation"].head(trainer.VALIDATION_SEQUENCES)
        kept[keep] = evaluate.quality(run, model, tokens)["kl"], min(seen), seen[-1]
    assert kept["best"][1] < 0.9 * kept["best"][2]  # otherwise this would show nothing
    assert kept["best"][0] == pytest.approx(kept["best"][1], rel=1e-4)
    assert kept["last"][0] == pytest.approx(kept["last"][2], rel=1e-4)


def test_the_curve_reaches_weights_and_biases(finished_run, tmp_path, monkeypatch):
    seen, fake = [], types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **_: types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = uptrained(finished_run, tmp_path / "run", wandb=True)
    assert [step for step, _ in seen] == [record["step"] for record in curve(run)]
    assert seen[-1][1]["validation/kl"] == curve(run)[-1]["validation_kl"]


def test_the_plan_knows_what_saves_memory(finished_run, tmp_path):
    def planned(**settings) -> float:
        recipe = finished_run.recipe.model_dump(mode="json")
        recipe["uptrain"] |= settings
        return plan.uptrain_memory_bytes(Run(config.parse(recipe), tmp_path, Progress(quiet=True)))

    whole, savings = (
        planned(),
        {"micro_batch_sequences": 1, "activation_checkpointing": True, "lora_rank": 2},
    )
    for name, value in (savings | {"processes": 2}).items():
        assert planned(**{name: value}) < whole, name


# --------------------------------------------------------------------------------------------- data


def test_sequence_lengths_change_in_stages_and_join_neighbouring_rows(
    finished_run, tmp_path, monkeypatch
):
    real, seen = gkd.Pair.losses, []
    monkeypatch.setattr(
        gkd.Pair, "losses", lambda pair, tokens: (seen.append(tokens), real(pair, tokens))[1]
    )
    stages = [{"sequence_length": 32, "tokens": 512}, {"sequence_length": 128, "tokens": 512}]
    run = uptrained(finished_run, tmp_path / "run", stages=stages)
    assert [tuple(tokens.shape) for tokens in seen] == [(8, 32), (8, 32), (2, 128), (2, 128)]
    data = run.corpus["train"]
    stream = data.rows(range(len(data))).flatten()
    at = {tuple(row.tolist()) for row in stream[: len(stream) // 128 * 128].view(-1, 128)}
    assert all(tuple(row.tolist()) in at for tokens in seen[2:] for row in tokens)


def test_a_corpus_too_short_for_one_long_sequence_is_refused(finished_run):
    with pytest.raises(UserError, match="do not fill one of"):
        finished_run.corpus["train"].view(join=100_000)


def test_another_seed_gives_the_same_rows_in_another_order(finished_run):
    data = finished_run.corpus["train"]
    first, second = (data.view(seed=seed).batch(0, len(data)).tolist() for seed in (0, 1))
    assert first == data.batch(0, len(data)).tolist() != second
    assert sorted(first) == sorted(second)


# -------------------------------------------------------------------------------------- what learns


def changed(run: Run) -> set[str]:
    before = weights(run, "assemble")
    return {name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}


def test_frozen_weights_stay_to_the_bit(finished_run, tmp_path):
    run = uptrained(
        finished_run, tmp_path / "run", freeze=["*norm*", "lm_head.*", "model.layers.1.*"]
    )
    frozen = {
        n for n in weights(run) if "norm" in n or "embed" in n or n.startswith("model.layers.1.")
    }  # tied head
    assert changed(run) == weights(run).keys() - frozen


def test_only_replaced_blocks_learn_where_asked(finished_run, tmp_path):
    run = uptrained(finished_run, tmp_path / "run", train="replaced")
    architecture, own = (
        child.read_architecture(run.stage_folder("assemble")),
        run.parent.shape.parent_block,
    )
    replaced = tuple(f"model.layers.{i}." for i, block in enumerate(architecture) if block != own)
    assert 0 < len(replaced) < len(architecture.blocks)  # otherwise this would show nothing
    assert changed(run) == {name for name in weights(run) if name.startswith(replaced)}


def test_adapters_are_merged_into_weights_of_the_same_names(finished_run, tmp_path):
    pytest.importorskip("peft")
    run = uptrained(finished_run, tmp_path / "run", lora_rank=2, learning_rate=1e-2)
    before, after = weights(run, "assemble"), weights(run)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert changed(run) == {n for n in after if "_proj" in n}
    for name in changed(run):
        assert (
            torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-3) <= 2
        )
    model = child.load(run.stage_folder("uptrain"), torch.float32, run.device, run.attention)
    tokens = run.corpus["validation"].head(trainer.VALIDATION_SEQUENCES)
    assert evaluate.quality(run, model, tokens)["kl"] == pytest.approx(
        curve(run)[-1]["validation_kl"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["model.layer.*"]}, "matches no weight"),
        ({"freeze": ["*"]}, "leave no weight to learn"),
        (
            {"stages": [{"sequence_length": 48, "tokens": 512}]},
            "a multiple of corpus.sequence_length",
        ),
        (
            {"stages": [{"sequence_length": 512, "tokens": 512}], "batch_sequences": 16},
            "at most 256",
        ),
        ({"processes": 3}, "cannot be shared by 3 processes"),
        ({"lora_rank": 4, "processes": 2}, "lora_rank is for one process"),
        ({"cosine_weight": 0, "kl_weight": 0}, "nothing to learn"),
        ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, "exceed 1"),
        ({"lora_rank": 4}, "pip install peft"),
        ({"wandb": True}, "pip install wandb"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    finished_run, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setattr(uptrain, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words) as error:
        uptrained(finished_run, tmp_path / "run", **settings)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- several processes

STEPS = 80
SEVERAL = {"tokens": STEPS * 8 * 32, "checkpoint_steps": 2, "validate_steps": 40, "processes": 2}


def kill_process_one(run: Run) -> None:
    """As soon as there is a checkpoint: SIGKILL for the process of rank 1 of this run."""
    while not (run.stage_folder("uptrain") / checkpoint.FOLDER / "uptrain.safetensors").exists():
        time.sleep(0.02)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_process_one(folder, run):
            os.kill(int(folder.name), signal.SIGKILL)


def _is_process_one(folder: Path, run: Run) -> bool:
    try:
        ours = str(run.folder).encode() in (folder / "cmdline").read_bytes().split(b"\0")
        return ours and b"RANK=1" in (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def processes_of(run: Run) -> list[str]:
    return [
        p.parent.name
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if str(run.folder).encode() in p.read_bytes()
    ]


@pytest.fixture(scope="module")
def two(finished_run, tmp_path_factory) -> Run:
    """On two processes, without interruption; micro-batches and recomputed activations on top."""
    more = {"micro_batch_sequences": 2, "activation_checkpointing": True}
    return uptrained(finished_run, tmp_path_factory.mktemp("two") / "run", **SEVERAL, **more)


@pytest.fixture(scope="module")
def killed(finished_run, tmp_path_factory) -> tuple[Run, str]:
    """A run on two processes of which one was killed, and what it ended with."""
    more = {"micro_batch_sequences": 2, "activation_checkpointing": True}
    run = assembled(finished_run, tmp_path_factory.mktemp("killed") / "run", **SEVERAL, **more)
    killer = threading.Thread(target=kill_process_one, args=(run,), daemon=True)
    killer.start()
    with pytest.raises(UserError) as error:
        pipeline.execute_stage(run, "uptrain")
    return run, str(error.value)


def test_two_processes_give_the_curve_of_one(finished_run, two, tmp_path):
    one = uptrained(finished_run, tmp_path / "one", **(SEVERAL | {"processes": 1}))
    assert_same_curve(two, one, rel=1e-3)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=0.02, atol=2e-3)


def test_a_killed_process_ends_the_run_with_one_line_and_nothing_left_behind(killed):
    run, line = killed
    assert (
        "process 1 was killed (SIGKILL); the same command goes on from step" in line
        and "\n" not in line
    )
    assert not processes_of(run)


def test_workers_end_with_the_command_that_started_them_even_if_it_is_killed(
    finished_run, tmp_path
):
    run = assembled(finished_run, tmp_path / "run", **(SEVERAL | {"tokens": 10_000_000}))
    command = subprocess.Popen(
        [sys.executable, "-m", "puzzle.cli", "uptrain", str(run.folder), "--quiet"]
    )
    while not (run.stage_folder("uptrain") / checkpoint.FOLDER / "uptrain.safetensors").exists():
        assert command.poll() is None
        time.sleep(0.05)
    assert len(processes_of(run)) == 4  # the command, torchrun, two workers
    command.kill()
    command.wait()
    ends = time.monotonic() + 20
    while processes_of(run) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not processes_of(run)


def test_it_goes_on_bit_identically_on_as_many_processes_and_alike_on_fewer(killed, two, tmp_path):
    run, _ = killed
    shutil.copytree(run.folder, tmp_path / "fewer")
    recipe = run.recipe.model_copy(
        update={"uptrain": run.recipe.uptrain.model_copy(update={"processes": 1})}
    )
    fewer = Run(recipe, tmp_path / "fewer", Progress(quiet=True))
    started = checkpoint.peek(
        run.stage_folder("uptrain") / checkpoint.FOLDER / "uptrain.safetensors"
    )[0]
    assert 0 < started < STEPS
    pipeline.execute_stage(run, "uptrain")
    name = "model.safetensors"
    assert (run.stage_folder("uptrain") / name).read_bytes() == (
        two.stage_folder("uptrain") / name
    ).read_bytes()
    pipeline.execute_stage(fewer, "uptrain")
    assert_same_curve(fewer, two, rel=1e-3)
