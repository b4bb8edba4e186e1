"""Parents in every layout that hubs and disks have them in: taken as they are, or refused by name.

The oracle of a layout that is taken is the same model in its plainest layout: the same child, bit
for bit, with no tensor more.
"""

import json
import re
import shutil
from pathlib import Path

import families
import pytest
import torch
from children import write_child
from conftest import make_parent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from puzzle.errors import UserError
from puzzle.model import child, parent

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BLOCKS = ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+no_op", "gqa_2+gated_64"]


def config(folder, **changes):
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in removed}))


def weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder, size="50KB"):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def under_mistrals_names(folder):
    tensors = load_file(folder / "model.safetensors")
    renamed = {"tok_embeddings.weight": tensors["model.embed_tokens.weight"] + 1}
    renamed["layers.0.attention.wq.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"] + 1
    renamed["model.norm.weight"] = tensors["model.norm.weight"] + 1  # would be taken for ours
    save_file(renamed, folder / "consolidated.safetensors")


def sharded_and_consolidated(folder):
    under_mistrals_names(folder)
    shard(folder)


def stale_shards(folder):
    shard(folder)
    zeros = {"model.norm.weight": torch.zeros(64)}
    save_file(zeros, folder / "model-00001-of-00099.safetensors")


def pickles_beside(folder):
    torch.save({"model.norm.weight": torch.zeros(64)}, folder / "pytorch_model.bin")


def adapter_beside(folder):
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "adapter_model.safetensors")


def index_over_one_file(folder):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def symlinks(folder):
    (folder / "blobs").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.move(folder / name, folder / "blobs" / f"hash-of-{name}")
        (folder / name).symlink_to(folder / "blobs" / f"hash-of-{name}")


def head_stored_though_tied(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def buffers_of_old_llamas(tensors):
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def modules_of_others(tensors):
    tensors["vision_tower.patch.weight"] = torch.ones(3, 3)
    tensors["mtp.head.weight"] = torch.ones(3, 3)


def old_keys(folder):
    config(folder, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    config(folder, dtype=None, torch_dtype="float32")


def own_code(folder):
    """As Phi-3 is on the hub: classes of its own, whose files a download leaves out."""
    config(
        folder,
        auto_map={
            "AutoConfig": "configuration_llama.Config",
            "AutoModelForCausalLM": "modeling_llama.Model",
        },
    )
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


TAKEN = {
    "one file": lambda folder: None,
    "shards with an index": shard,
    "an index over one file": index_over_one_file,
    "shards, and Mistral's `consolidated.safetensors`": sharded_and_consolidated,
    "one file, and Mistral's `consolidated.safetensors`": under_mistrals_names,
    "shards, and other shards that the index does not name": stale_shards,
    "safetensors, and `pytorch_model.bin`": pickles_beside,
    "safetensors, and `adapter_model.safetensors`": adapter_beside,
    "links into a cache": symlinks,
    "tied embeddings, and the head stored as well": lambda folder: weights(
        folder, head_stored_though_tied
    ),
    "buffers stored (`rotary_emb.inv_freq` of old Llamas)": lambda folder: weights(
        folder, buffers_of_old_llamas
    ),
    "tensors of modules that the family has not": lambda folder: weights(folder, modules_of_others),
    "`torch_dtype`, `rope_theta` and `rope_scaling` of older configs": old_keys,
    "`auto_map` of a family that is supported, without its files": own_code,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tied Llama in one file, and its child."""
    folder = make_parent(tmp_path_factory.mktemp("plain") / "parent")
    return folder, write_child(parent.describe(str(folder)), folder.parent / "child", BLOCKS)


@pytest.mark.parametrize("layout", TAKEN)
def test_a_layout_that_is_taken_gives_the_same_child(layout, plain, tmp_path):
    folder, expected = plain
    shutil.copytree(folder, tmp_path / "parent")
    TAKEN[layout](tmp_path / "parent")
    described = parent.describe(str(tmp_path / "parent"))
    described.check_weights()
    assert len(described.tokenizer) == len(parent.describe(str(folder)).tokenizer)
    made = write_child(described, tmp_path / "child", BLOCKS)
    here, there = (load_file(f / "model.safetensors") for f in (made, expected))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert {f.name for f in made.iterdir()} == {f.name for f in expected.iterdir()}
    assert (made / "config.json").read_text() == (expected / "config.json").read_text()


def test_phi3_as_it_is_on_the_hub(tmp_path):
    """Its config names code of its own, has no head_dim, and keys that newer ones lack."""
    folder = families.make("phi3", tmp_path / "parent", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    config(
        folder,
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling=None,
        partial_rotary_factor=None,
        layer_types=None,
        dtype=None,
        torch_dtype="bfloat16",
        transformers_version="4.40.2",
        attention_bias=False,
        resid_pdrop=0.0,
    )
    described = parent.describe(str(folder))
    described.check_weights()
    tokens = torch.randint(0, 320, (2, 40))
    with torch.no_grad():
        ours = described.load(torch.bfloat16, CPU)(tokens).logits
        assert torch.equal(ours, theirs(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_where_the_config_says_no_dtype_the_weights_do(tmp_path, dtype):
    folder = make_parent(tmp_path / "parent", dtype=dtype)
    config(folder, dtype=None)
    described = parent.describe(str(folder))
    assert described.dtype == dtype
    made = write_child(described, tmp_path / "child", BLOCKS)
    assert child.load(made, None, CPU).dtype == dtype
    parent.write_description(described, tmp_path / "description")
    away = parent.read_description(tmp_path / "description")
    assert away.dtype == dtype  # on a machine without the weights


# ----------------------------------------------------------------------------------------- refused


def only(name, content=b""):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return edit


def index(weight_map):
    def edit(folder):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def shards_without_index(folder):
    shard(folder)
    (folder / INDEX).unlink()


def a_missing_shard(folder):
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def consolidated_only(folder):
    under_mistrals_names(folder)
    (folder / "model.safetensors").unlink()


def quantised(**settings):
    return lambda folder: config(folder, quantization_config=settings)


def fp8_weights(t):
    name = "model.layers.0.mlp.up_proj.weight"
    t[name] = t[name].to(torch.float8_e4m3fn)


def gptq_weights(t):
    del t["model.layers.0.mlp.up_proj.weight"]
    t["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)


DIFFER = "weights and config.json differ: "
Q = "model.layers.0.self_attn.q_proj.weight"
REFUSED = {
    "only `pytorch_model.bin`": (
        only("pytorch_model.bin"),
        "pytorch_model.bin: pickled weights, which are never read as they can run code; convert",
    ),
    "only shards of `pytorch_model.bin`": (
        only("pytorch_model.bin.index.json", b"{}"),
        "pytorch_model.bin.index.json: an index of weights that are not safetensors; convert",
    ),
    "only `consolidated.safetensors`": (
        consolidated_only,
        "weights under Mistral's own names only; download model*.safetensors and",
    ),
    "only an adapter": (only("adapter_model.safetensors"), "an adapter; merge it into its base"),
    "only GGUF": (only("model.Q4_K_M.gguf"), "GGUF weights, which are quantised or renamed"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        f"no model.safetensors and no {INDEX} there; expected the weights of the model",
    ),
    "shards without their index": (shards_without_index, "shards without their index; download"),
    "a shard that is missing": (a_missing_shard, "is not there; is the download complete?"),
    "an index that names a path": (
        index({"model.norm.weight": "../../etc/x.safetensors"}),
        "'model.norm.weight' is in '../../etc/x.safetensors'; expected the name of a safetensors",
    ),
    "an index without a weight_map": (index(None), "no weight_map; expected a file's name for"),
    "an index that another download belongs to": (
        index({"model.layers.9.mlp.weight": "model.safetensors"}),
        f"lacks model.layers.9.mlp.weight, which {INDEX} says is in it; download both again",
    ),
    "FP8": (
        quantised(quant_method="fp8", activation_scheme="dynamic"),
        "its weights are quantised (FP8); expected float32, bfloat16 or float16: give the",
    ),
    "GPTQ": (quantised(quant_method="gptq", bits=4), "quantised (GPTQ, 4 bits)"),
    "AWQ": (quantised(quant_method="awq", bits=4), "quantised (AWQ, 4 bits)"),
    "compressed-tensors": (
        quantised(quant_method="compressed-tensors", format="pack-quantized"),
        "quantised (compressed-tensors)",
    ),
    "compressed-tensors, the old key": (
        lambda folder: config(folder, compression_config={"format": "int-quantized"}),
        "quantised (int-quantized)",
    ),
    "bitsandbytes": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        "quantised (bitsandbytes)",
    ),
    "GPTQ of older days (`quantize_config.json`)": (
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        "quantised (GPTQ)",
    ),
    "FP8 weights without a word in the config": (
        lambda folder: weights(folder, fp8_weights),
        "quantised (model.layers.0.mlp.up_proj.weight is F8_E4M3)",
    ),
    "GPTQ weights without a word in the config": (
        lambda folder: weights(folder, gptq_weights),
        "quantised (it holds model.layers.0.mlp.up_proj.qweight)",
    ),
    "a config of a wider model": (
        lambda folder: config(folder, intermediate_size=128),
        "down_proj.weight is 64 x 96 in model.safetensors, but 64 x 128 by config.json",
    ),
    "a config with another vocabulary": (
        lambda folder: config(folder, vocab_size=512),
        DIFFER + "model.embed_tokens.weight is 320 x 64 in model.safetensors, but 512 x 64 by",
    ),
    "a config with more layers": (
        lambda folder: config(folder, num_hidden_layers=5),
        DIFFER + "model.layers.4.self_attn.q_proj.weight is missing; is a shard",
    ),
    "a config with fewer layers": (
        lambda folder: config(folder, num_hidden_layers=3),
        "is there, but config.json says 3 layers",
    ),
    "a config with other KV heads": (
        lambda folder: config(folder, num_key_value_heads=4),
        "k_proj.weight is 32 x 64 in model.safetensors, but 64 x 64 by config.json",
    ),
    "a config of untied embeddings over tied weights": (
        lambda folder: config(folder, tie_word_embeddings=False),
        DIFFER + "lm_head.weight is missing",
    ),
    "KV heads that do not divide the heads": (
        lambda folder: config(folder, num_key_value_heads=3),
        "config.json: 4 attention heads cannot share 3 KV heads equally",
    ),
    "a file that is cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ),
        "model.safetensors: not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_a_layout_that_is_refused_says_what_to_do(layout, plain, tmp_path):
    edit, message = REFUSED[layout]
    folder = tmp_path / "parent"
    shutil.copytree(plain[0], folder)
    edit(folder)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        parent.describe(str(folder)).check_weights()
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_fused_matrix_of_another_size_is_refused(tmp_path):
    """It would be cut in the wrong places without a word."""
    folder = families.make("phi3", tmp_path / "parent")
    config(folder, num_key_value_heads=1)
    with pytest.raises(UserError, match=r"qkv_proj.weight is 256 x 128 in .*, but 192 x 128 by"):
        parent.describe(str(folder)).check_weights()


def test_the_page_lists_every_layout_that_was_tried():
    rows = re.findall(r"^\| ([^|]+) \| (taken|refused)", PAGE.read_text(), re.M)
    tried = [(name, "taken") for name in TAKEN] + [(name, "refused") for name in REFUSED]
    assert rows == tried
