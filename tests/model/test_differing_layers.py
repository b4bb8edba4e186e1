"""Parents whose layers differ already: children of ours and checkpoints with NVIDIA's keys."""

import json

import pytest
import torch
from children import MIXED, write_child
from conftest import make_tokenizer, tiny_recipe

from puzzle import artifacts, config, pipeline
from puzzle.assemble import measured
from puzzle.errors import UserError
from puzzle.model import child, parent, space
from puzzle.model.architecture import Architecture, parse_block
from puzzle.progress import Progress
from puzzle.run import Run

CPU = torch.device("cpu")
TOKENS = torch.tensor([[5, 17, 200, 31, 7, 250]])


def nvidia_checkpoint(folder, widths, *, by_multiple):
    """A random checkpoint with the keys of NVIDIA's config.json.

    `widths`: FFN width of every layer, None for a no-op. `by_multiple`: the widths are written as
    `ffn_mult`, as the older checkpoints have them.
    """
    hidden, heads = 128, 4
    blocks = []
    for index, width in enumerate(widths):
        ffn = {"no_op": width is None, "replace_with_linear": False, "sparsify": None}
        if by_multiple:
            ffn["ffn_mult"] = None if width is None else 3 * width / (2 * hidden)
        else:
            ffn |= {"intermediate_size": width, "hidden_act": "silu"}
        attention = {
            "n_heads_in_group": None if index == 2 else 4 if index == 1 else 2,
            "no_op": index == 2,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        }
        blocks.append({"attention": attention, "ffn": ffn})
    settings = {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": heads,
        "num_hidden_layers": len(widths),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 320,
    }
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    described = parent.describe(str(folder))
    torch.manual_seed(0)
    model = child.PuzzleForCausalLM(described.child_config(Architecture.of_parent(described.shape)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("by_multiple", [True, False])
def test_a_checkpoint_with_nvidias_keys_is_a_parent_without_its_code(tmp_path, by_multiple):
    """ffn_mult is rounded up to a multiple of 256, as NVIDIA's modelling code does."""
    widths = [512, 256, 512, None]
    folder = nvidia_checkpoint(tmp_path / "nas", widths, by_multiple=by_multiple)
    described = parent.describe(str(folder))
    names = ["gqa_2+gated_512", "gqa_1+gated_256", "no_op+gated_512", "gqa_2+no_op"]
    assert [block.name for block in described.shape.parent_blocks] == names
    stored = described.weights()
    assert stored["model.layers.1.mlp.up_proj.weight"].shape == (256, 128)
    model = described.load(torch.float32, CPU)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert torch.isfinite(model(TOKENS).logits).all()
    assert model(TOKENS).logits.std() > 0


@pytest.mark.parametrize("names", MIXED.values(), ids=MIXED.keys())
def test_a_child_as_a_parent_gives_bitwise_its_own_logits(tiny, tmp_path, names):
    folder = write_child(tiny, tmp_path / "child", names)
    described = parent.describe(str(folder))
    assert described.shape.parent_blocks == Architecture.from_names(names).blocks
    expected = child.load(folder, torch.float32, CPU)(TOKENS).logits
    assert torch.equal(described.load(torch.float32, CPU)(TOKENS).logits, expected)


def test_every_layer_offers_only_what_is_smaller_than_its_own_block(tiny, tmp_path):
    names = ["gqa_1+gated_96", "no_op+linear", "linear+gated_32", "gqa_2+no_op"]
    described = parent.describe(str(write_child(tiny, tmp_path / "child", names)))
    library = config.LibraryConfig(ffn_percent=[50], ffn_multiple=16)
    layers = space.build(library, described.shape, ["transformers"]).layers
    attention = [[variant.name for variant in layer.attention] for layer in layers]
    ffn = [[variant.name for variant in layer.ffn] for layer in layers]
    assert attention == [
        ["gqa_1", "linear", "no_op"],
        ["no_op"],
        ["linear", "no_op"],
        ["gqa_2", "gqa_1", "linear", "no_op"],
    ]
    assert ffn == [
        ["gated_96", "gated_48", "linear", "no_op"],
        ["linear", "no_op"],
        ["gated_32", "gated_16", "linear", "no_op"],
        ["no_op"],
    ]
    assert [layer.blocks[0].name for layer in layers] == names


def test_a_wrong_number_of_block_configs_is_one_line(tiny, tmp_path):
    folder = write_child(tiny, tmp_path / "child", MIXED["reduced"])
    settings = artifacts.read_object(folder / "config.json")
    settings["num_hidden_layers"] = 5
    artifacts.write_json(folder / "config.json", settings)
    with pytest.raises(UserError, match="got 4 block_configs, expected one for each of its 5"):
        parent.describe(str(folder))


@pytest.mark.training
@pytest.mark.parametrize("kind", ["a child", "nvidia's keys"])
def test_a_whole_run_makes_a_grandchild(kind, tiny, text_folder, tmp_path):
    names = ["gqa_2+gated_96", "no_op+gated_64", "linear+gated_96", "gqa_1+linear"]
    if kind == "a child":
        folder = write_child(tiny, tmp_path / "child", names)
    else:
        folder = nvidia_checkpoint(tmp_path / "nas", [512, 256, 512, None], by_multiple=True)
    recipe = tiny_recipe(folder, text_folder, tmp_path / "run")
    recipe["library"] |= {"initialization": "least_squares", "ffn_multiple": 16}
    recipe["search"] = {"parameters": "80%"}
    run = Run(config.parse(recipe), tmp_path / "run", Progress(quiet=True))
    pipeline.execute(run)
    job = run.child_job("main")
    assert measured.read(job).verdict == "met"
    grandchild = tmp_path / "run" / "children" / "main" / "uptrained"
    made = child.read_architecture(grandchild)
    parents = run.parent.shape.parent_blocks
    assert made.blocks != parents
    for block, original in zip(made, parents, strict=True):
        assert block.attention.kv_heads <= original.attention.kv_heads
        assert block.ffn.intermediate_size <= original.ffn.intermediate_size
    # layers that the search left alone keep the parent's weights up to the assembled child
    assembled = child.load(grandchild.parent / "child", torch.float32, CPU).state_dict()
    stored = run.parent.weights()
    kept = [i for i, (a, b) in enumerate(zip(made, parents, strict=True)) if a == b]
    for name in (name for i in kept for name in stored if name.startswith(f"model.layers.{i}.")):
        assert torch.equal(assembled[name], stored[name])
    # and the grandchild is a parent, too
    again = parent.describe(str(grandchild))
    assert again.shape.parent_blocks == made.blocks
    assert parse_block(made.names[0]) == made.blocks[0]
