"""Which weights learn: frozen patterns, replaced blocks, adapters."""

import pytest
import torch
from uptrainings import held_out_means, load, uptrained, weights

from puzzle.assemble import ASSEMBLE
from puzzle.model import child
from puzzle.stage import Job
from puzzle.uptrain import trainer

pytestmark = pytest.mark.training


def changed(job: Job) -> set[str]:
    before = weights(job, ASSEMBLE)
    return {name for name, tensor in weights(job).items() if not torch.equal(tensor, before[name])}


def test_frozen_weights_stay_to_the_bit(finished_run, tmp_path):
    patterns = ["*norm*", "lm_head.*", "model.layers.1.*"]
    job = uptrained(finished_run, tmp_path / "run", freeze=patterns)
    frozen = {
        name
        for name in weights(job)
        # the head is tied to the embedding
        if "norm" in name or "embed" in name or name.startswith("model.layers.1.")
    }
    assert changed(job) == weights(job).keys() - frozen


def test_only_replaced_blocks_learn_where_asked(finished_run, tmp_path):
    job = uptrained(finished_run, tmp_path / "run", train="replaced")
    architecture = child.read_architecture(job.folder(ASSEMBLE))
    parent_block = job.run.parent.shape.widest_block
    replaced = tuple(
        f"model.layers.{index}."
        for index, block in enumerate(architecture)
        if block != parent_block
    )
    assert 0 < len(replaced) < len(architecture.blocks)  # otherwise this would show nothing
    assert changed(job) == {name for name in weights(job) if name.startswith(replaced)}


def test_adapters_are_merged_into_weights_of_the_same_names(finished_run, tmp_path):
    pytest.importorskip("peft")
    job = uptrained(finished_run, tmp_path / "run", lora_rank=2, learning_rate=1e-2)
    before, after = weights(job, ASSEMBLE), weights(job)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert changed(job) == {name for name in after if "_proj" in name}
    for name in changed(job):
        difference = after[name].double() - before[name].double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    validated_kl = trainer.read_curve(job)[-1].validation["kl"]
    assert held_out_means(job, load(job))["kl"] == pytest.approx(validated_kl, rel=1e-3)
