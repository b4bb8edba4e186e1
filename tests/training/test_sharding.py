"""Two processes of a sharded pair against one: losses, gradients, groups and dtypes."""

import faulthandler
from pathlib import Path

import pytest
import torch
from conftest import make_parent
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FSDPModule

from puzzle.config import UptrainConfig
from puzzle.device import Placement
from puzzle.model import parent
from puzzle.model.architecture import Architecture, Block, parse_attention, parse_ffn
from puzzle.training import sharding
from puzzle.training.checkpoint import gathered
from puzzle.uptrain.gkd import Pair

pytestmark = pytest.mark.training
CPU = torch.device("cpu")
TOKENS = torch.arange(4 * 16).view(4, 16) % 300
SETTINGS = UptrainConfig(lm_weight=0.5)


def pair_of(folder: Path, shards: sharding.Shards | None, *, checkpointing: bool) -> Pair:
    """Parent and child: the parent but for one narrower layer, which has its first channels."""
    described = parent.describe(str(folder))
    architecture = Architecture.of_parent(described.shape)
    small = Block(parse_attention("gqa_2"), parse_ffn("gated_64"))
    child_architecture = Architecture((*architecture.blocks[:-1], small))
    state = dict(described.weights())
    last = f"model.layers.{len(architecture) - 1}.mlp"
    for name in ("gate_proj", "up_proj"):
        state[f"{last}.{name}.weight"] = state[f"{last}.{name}.weight"][:64]
    state[f"{last}.down_proj.weight"] = state[f"{last}.down_proj.weight"][:, :64]
    configs = [described.child_config(a) for a in (child_architecture, architecture)]
    if shards is None:
        from puzzle.model import child

        learning = child.build(configs[0], state, torch.float32, CPU)
        return Pair(learning, described.load(torch.float32, CPU), SETTINGS, checkpointing)
    placement = Placement(torch.float32, CPU, "sdpa")
    learning = shards.load(configs[0], state, placement, lambda model: None)
    frozen = shards.load(configs[1], described.weights(), placement, sharding.freeze)
    pair = Pair(learning, frozen, SETTINGS, checkpointing)
    shards.add_rest(pair)
    return pair


def learn(pair: Pair, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Terms of the loss and gradients, added up over two micro-batches."""
    pair.child.train()
    terms = torch.zeros(3)
    for micro in tokens.chunk(2):
        loss, found = pair(micro)
        (loss / 2).backward()
        terms += found / 2
    return terms, {n: gathered(p.grad) for n, p in pair.child.named_parameters()}


def worker(rank: int, folder: Path, out: Path) -> None:
    """Both in float32 and with products in bfloat16; process 0 writes what came out."""
    faulthandler.enable()
    torch.set_num_threads(1)
    address = f"file://{out}.rendezvous"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        over = sharding.mesh(CPU)
        kinds = {"plain": None, "mixed": torch.bfloat16}
        results = {
            name: of_shards(sharding.Shards(over, kind), folder) for name, kind in kinds.items()
        }
        if rank == 0:
            torch.save(results, out)
    finally:
        distributed.destroy_process_group()
    sharding.leave(0)


def of_shards(shards: sharding.Shards, folder: Path) -> dict:
    rank = sharding.rank()
    pair = pair_of(folder, shards, checkpointing=True)
    with torch.no_grad():
        metrics = [sharding.summed(m) for m in pair(TOKENS[rank::2], metrics=True)]
    sharding.reshard(pair)
    seen = []
    pair.child.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.weight.dtype, inputs[0].dtype))
    )
    terms, gradients = learn(pair, TOKENS[rank::2])
    return {
        "terms": sharding.summed(terms) / 2,
        "gradients": gradients,
        "groups": [name for name, m in pair.named_modules() if isinstance(m, FSDPModule)],
        "seen": set(seen),
        "metrics": metrics,
        "dtypes": {p.dtype for p in pair.child.parameters()},
    }


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def on_two_and_one(request, tmp_path_factory) -> tuple[dict, dict, Pair]:
    """Two processes, plain and mixed, and the same pair in this one."""
    root = tmp_path_factory.mktemp("sharded")
    folder = make_parent(root / "parent", tie_word_embeddings=request.param)
    multiprocessing.spawn(worker, (folder, root / "result.pt"), nprocs=2)
    results = torch.load(root / "result.pt", weights_only=False)
    return results["plain"], results["mixed"], pair_of(folder, None, checkpointing=False)


def test_two_processes_learn_and_measure_what_one_does(on_two_and_one):
    plain, _, pair = on_two_and_one
    with torch.no_grad():
        measured = pair(TOKENS, metrics=True)
    for ours, theirs in zip(plain["metrics"], measured, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    terms, gradients = learn(pair, TOKENS)
    torch.testing.assert_close(plain["terms"], terms, rtol=1e-5, atol=1e-6)
    assert plain["gradients"].keys() == gradients.keys()
    for name, gradient in plain["gradients"].items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)
    pair.zero_grad()


def test_embedding_and_head_are_groups_of_their_own_or_one_where_they_are_tied(on_two_and_one):
    """Of a list of modules that are one group FSDP2 marks each."""
    groups = [name for name in on_two_and_one[0]["groups"] if name.startswith("child.")]
    layers = [f"child.model.layers.{index}" for index in range(4)]
    assert sorted(groups) == sorted([*layers, "child.model.embed_tokens", "child.lm_head"])


def test_layers_compute_in_bfloat16_and_gradients_add_up_in_float32(on_two_and_one):
    _, mixed, pair = on_two_and_one
    assert mixed["seen"] == {(torch.bfloat16, torch.bfloat16)}
    assert mixed["dtypes"] == {torch.float32}
    terms, gradients = learn(pair, TOKENS)
    torch.testing.assert_close(mixed["terms"], terms, rtol=0.05, atol=0.01)
    for name, gradient in mixed["gradients"].items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), gradients[name].flatten(), dim=0)
        assert cosine > 0.97, name  # bf16 has three digits, and errors of layers add up
    pair.zero_grad()
