"""Where Puzzle computes: what `auto` takes, and what it refuses to do silently."""

import pytest
import torch

from puzzle.device import Device
from puzzle.errors import UserError


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A driver that lists a GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Device.choose("auto", "float32").type == "cpu"


def test_auto_does_not_compute_beside_a_gpu_with_a_torch_without_cuda(gpu):
    gpu.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError) as raised:
        Device.choose("auto", "auto")
    message = str(raised.value)
    assert "NVIDIA H100 80GB HBM3" in message and "without CUDA" in message
    assert "device=cpu" in message and "\n" not in message


def test_auto_says_why_a_driver_is_too_old(gpu):
    def refuse():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update it.\n"
        )

    gpu.setattr(torch.version, "cuda", "13.0")
    gpu.setattr(torch.cuda, "init", refuse)
    with pytest.raises(
        UserError, match=r"driver on your system is too old \(found version 11040\)"
    ):
        Device.choose("auto", "auto")


def test_a_gpu_that_is_hidden_or_not_asked_for_is_no_error(gpu):
    gpu.setattr(torch.version, "cuda", None)
    assert Device.choose("cpu", "float32").type == "cpu"
    gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Device.choose("auto", "float32").type == "cpu"
