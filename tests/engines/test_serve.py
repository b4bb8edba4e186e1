"""`puzzle serve` talks to a real client: the openai package."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from children import job_with_child
from conftest import NEEDS_VLLM

from puzzle.engines import vllm_engine
from puzzle.errors import UserError
from puzzle.export.stage import source
from puzzle.model import child

LINEAR = ["gqa_1+gated_96", "no_op+linear", "linear+gated_32", "gqa_2+no_op"]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(job, base URL) of a child that needs our plugin, served in a process of its own."""
    job, port = job_with_child(tmp_path_factory.mktemp("serve"), LINEAR), free_port()
    run_folder = job.run.folder
    log = (run_folder / "server.log").open("wb")
    command = [sys.executable, "-m", "puzzle.cli", "serve", str(run_folder), "--port", str(port)]
    command += ["--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 26)]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            tail = (run_folder / "server.log").read_text(errors="replace")[-3000:]
            assert process.poll() is None and time.monotonic() < deadline, tail
            time.sleep(0.5)
        yield job, f"{url}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.training
@pytest.mark.vllm
@NEEDS_VLLM
def test_the_openai_client_gets_completions_chat_and_streams(server):
    openai = pytest.importorskip("openai")
    job, url = server
    name = job.run.folder.name
    client = openai.OpenAI(base_url=url, api_key="none")
    assert [model.id for model in client.models.list().data] == [name]

    prompt = "def add(left, right):"
    request = {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    model = child.load(source(job), torch.float32, torch.device("cpu"))
    tokenizer = job.run.parent.tokenizer
    ids = torch.tensor([tokenizer(prompt).input_ids])
    generated = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    ours = generated[0, ids.shape[1] :]
    assert text == tokenizer.decode(ours, skip_special_tokens=True)
    streamed = client.completions.create(**request, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == text

    chat = {
        "model": name,
        "messages": [{"role": "user", "content": "add"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**chat).choices[0].message.content
    parts = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(**chat, stream=True)
    ]
    assert answer and len(parts) > 1 and "".join(parts) == answer


def test_serving_without_vllm_is_one_clear_line(tmp_path, monkeypatch):
    job = job_with_child(tmp_path, LINEAR)
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="serve: the vllm package is not installed"):
        vllm_engine.serve_openai(
            vllm_engine.Server(source(job), "x", "127.0.0.1", 1, job.place.cost.scenario), []
        )


def test_a_run_without_a_child_cannot_be_served(tiny_run):
    tiny_run.write()
    with pytest.raises(UserError, match="child main is not made yet; run `puzzle run` first"):
        source(tiny_run.child_job("main"))
