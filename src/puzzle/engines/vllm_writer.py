"""The worker that lets vLLM write text: prompts in, token ids out, one JSON line each.

python -m puzzle.engines.vllm_writer FOLDER SAMPLING
"""

import argparse
import sys
from pathlib import Path

from puzzle.engines import Sampling
from puzzle.engines.vllm_engine import register
from puzzle.engines.vllm_messages import REPLY, WriteReply, WriteRequest


def main() -> None:
    """Answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sampling", type=Sampling.model_validate_json)
    arguments = parser.parse_args()
    import torch
    from vllm import LLM, SamplingParams

    register()
    on_cpu = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 1 << 30}
    llm = LLM(
        str(arguments.folder),
        enforce_eager=not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **on_cpu,
    )
    eos = llm.llm_engine.vllm_config.model_config.hf_config.eos_token_id
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for line in sys.stdin:
        request = WriteRequest.parse(line, "request")
        sampled = [
            SamplingParams(
                max_tokens=arguments.sampling.tokens,
                temperature=arguments.sampling.temperature,
                seed=seed,
                stop_token_ids=stops,
                detokenize=False,
            )
            for seed in request.seeds
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        outputs = llm.generate(prompts, sampled, use_tqdm=False)
        reply = WriteReply(texts=[list(output.outputs[0].token_ids) for output in outputs])
        print(REPLY + reply.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
