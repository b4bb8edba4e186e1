"""Checkpoints that are written beside the training."""

import threading

import pytest
import torch
from torch import nn

from puzzle.training import checkpoint, snapshots
from puzzle.training.snapshots import Snapshots


def learner() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Snapshots, module, optimizer, number: int) -> None:
    folder.save("last", number, {"m": module}, {"o": optimizer}, {"note": number})


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Nothing is written before this is set."""
    real, event = checkpoint.write, threading.Event()

    def waits(*arguments) -> None:
        event.wait(10)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "write", waits)
    return event


def test_it_holds_what_was_trained_when_it_was_taken(tmp_path, held):
    (module, optimizer), folder = learner(), Snapshots(tmp_path)
    step(module, optimizer)
    expected = {n: p.detach().clone() for n, p in module.named_parameters()}
    save(folder, module, optimizer, 1)
    for _ in range(3):  # while the writer waits
        step(module, optimizer)
    assert snapshots.read(tmp_path, "last") is None
    held.set()
    folder.wait()
    fresh, its_optimizer = learner()
    index = Snapshots(tmp_path).restore("last", {"m": fresh}, {"o": its_optimizer})
    assert (index.step, index.notes) == (1, {"note": 1})
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, expected[name])
    for _ in range(3):  # moments and step are there, too: both end at the same bits
        step(fresh, its_optimizer)
    for ours, theirs in zip(fresh.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_one_leaves_the_one_before(tmp_path, monkeypatch):
    (module, optimizer), folder = learner(), Snapshots(tmp_path)
    save(folder, module, optimizer, 1)
    folder.wait()
    monkeypatch.setattr(snapshots.Index, "write", lambda *_: (_ for _ in ()).throw(OSError))
    save(folder, module, optimizer, 2)
    folder.writer.join()
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = Snapshots(tmp_path)
    assert again.restore("last", {"m": module}, {"o": optimizer}).step == 1
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["last.1.0-of-1.safetensors"]


def test_only_the_last_one_stays(tmp_path):
    (module, optimizer), folder = learner(), Snapshots(tmp_path)
    for number in (1, 2, 3):
        save(folder, module, optimizer, number)
    folder.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.3.0-of-1.safetensors", "last.json"]


def test_a_full_disk_is_told_at_the_next_one(tmp_path, monkeypatch):
    (module, optimizer), folder = learner(), Snapshots(tmp_path)
    monkeypatch.setattr(checkpoint, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
    save(folder, module, optimizer, 1)
    with pytest.raises(OSError, match="full"):
        save(folder, module, optimizer, 2)
