import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from puzzle.errors import UserError
from puzzle.training import checkpoint


def trained(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return {"m": module}, {"o": optimizer}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint as another process has left it."""
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, 7, *trained(), notes={"skipped": 2})
    monkeypatch.setattr(checkpoint, "_trusted", set())
    return path


def test_what_was_saved_is_restored_and_any_safetensors_reader_reads_it(saved):
    modules, optimizers = trained(seed=1)
    assert checkpoint.restore(saved, modules, optimizers) == (7, {"skipped": 2})
    expected_modules, expected_optimizers = trained()
    assert torch.equal(modules["m"].weight, expected_modules["m"].weight)
    state, expected = optimizers["o"].state_dict(), expected_optimizers["o"].state_dict()
    assert torch.equal(state["state"][0]["exp_avg"], expected["state"][0]["exp_avg"])
    with safe_open(saved, framework="pt") as file:
        assert torch.equal(file.get_tensor("module/m/weight"), expected_modules["m"].weight)


def test_no_byte_of_a_checkpoint_can_be_lost_unnoticed(saved, monkeypatch):
    """Every byte flipped once, and the file cut at every eighth byte."""
    whole = saved.read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [whole[:at] for at in range(0, len(whole), 8)]
    for data in damaged:
        saved.write_bytes(data)
        with pytest.raises(UserError, match=r"last.safetensors: is damaged .*trained again"):
            checkpoint.peek(saved)
    saved.write_bytes(whole)
    assert checkpoint.peek(saved)[0] == 7


@pytest.fixture
def mesh_of_three():
    """A group of three processes, of which only this one is there: nothing is sent."""
    distributed.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,))
    distributed.destroy_process_group()


def test_what_is_gathered_of_uneven_shards_can_be_written(mesh_of_three, tmp_path):
    """16 rows on three processes are 6, 6 and 4: torch gathers 18 and shows 16 of them."""
    shape, stride = torch.Size((16, 4)), (4, 1)
    shards = DTensor.from_local(
        torch.ones(6, 4), mesh_of_three, [Shard(0)], shape=shape, stride=stride
    )
    full = checkpoint.gathered(shards)
    assert full.shape == shape
    save_torch_state_dict({"weight": full}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["weight"].shape == shape
