"""An engine that dies, hangs, or prints garbage: one line, no process left, and the run goes on."""

import os
import subprocess
import sys
import time

import pytest

from puzzle import pipeline
from puzzle.artifacts import read_manifest
from puzzle.config import ScenarioConfig
from puzzle.cost import COST
from puzzle.engines import Engine, vllm_engine
from puzzle.errors import UserError

pytestmark = pytest.mark.training
READY = '@puzzle {"pages": [[16, 1024]]}'
STEPS = '@puzzle {"seconds": [0.1], "memory_bytes": 1, "preemptions": 0}'
# What a worker does: Python that gets no request, or answers each line it reads
WORKERS = {
    "dies at once": "import sys; sys.exit('CUDA error: out of luck')",
    "is killed while it serves": f"""
print('{READY}', flush=True)
input()
import os; os.kill(os.getpid(), 9)""",
    "hangs before it is ready": "import time; time.sleep(600)",
    "hangs while it serves": f"""
print('{READY}', flush=True)
input()
import time; time.sleep(600)""",
    "prints garbage": "print('INFO starting'); print('@puzzle {{{', flush=True); input()",
    "prints another record": f"print('{STEPS}', flush=True); input()",
    "prints bytes that are no text": """
import sys
sys.stdout.buffer.write(bytes(range(128, 256)) + b'\\n@puzzle \\xff\\n')
sys.stdout.flush()
input()""",
    "ends its output": "import os; os.close(1); import time; time.sleep(600)",
}


@pytest.fixture
def stub(monkeypatch):
    """Starts a program of ours instead of vLLM's worker; (how to choose it, what was started)."""
    program, started, popen = [], [], subprocess.Popen

    def start(command, **options):
        process = popen([sys.executable, "-c", program[0]], **options)
        started.append(process)
        return process

    monkeypatch.setattr(vllm_engine.subprocess, "Popen", start)
    monkeypatch.setattr(vllm_engine, "REPLY_WITHIN_S", 1.0)
    monkeypatch.setattr(vllm_engine, "ENDING_S", 1.0)
    return program, started


@pytest.mark.parametrize("how", WORKERS)
def test_an_engine_that_fails_is_one_line_and_leaves_no_process(tmp_path, stub, tally, how):
    program, started = stub
    program.append(WORKERS[how])
    scenario = ScenarioConfig(batch_size=2, input_length=4, output_length=4)
    with tally.fault(f"engine that {how}"):
        began = time.monotonic()
        with (
            pytest.raises(UserError, match="vllm") as error,
            vllm_engine.VllmSession(tmp_path / "child", scenario, tmp_path, probe=False) as session,
        ):
            session.begin(scenario)
            session.advance(1)
        assert "\n" not in str(error.value)
        assert time.monotonic() - began < 20
        assert started[0].poll() is not None
        with pytest.raises(ProcessLookupError):
            os.killpg(started[0].pid, 0)


def test_a_run_whose_engine_died_goes_on_when_it_serves_again(tiny_run, monkeypatch, stub, tally):
    job, (program, _) = tiny_run.place_job(), stub
    program.append(WORKERS["is killed while it serves"])
    works = job.engine
    fails = vllm_engine.make(tiny_run.folder / "logs")
    broken = Engine(works.name, works.measured, works.facts, serve=fails.serve, probe=fails.probe)
    with tally.fault("engine that is killed while it serves"):
        with monkeypatch.context() as patched, pytest.raises(UserError, match="vllm stopped"):
            patched.setitem(job.__dict__, "engine", broken)
            pipeline.execute_stage(COST, job)
        assert read_manifest(job.folder(COST)) is None
        job.__dict__["engine"] = works
        pipeline.execute_stage(COST, job)
        assert read_manifest(job.folder(COST)) is not None
