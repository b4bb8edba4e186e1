"""Parents: the folder, config.json, the weights, the tokenizer."""

import json

from case import Case


def parent(name: str, message: str, files: dict[str, str | bytes] | None = None) -> Case:
    """A run of the parent in `parent`, some of whose files are others."""
    given = {f"parent/{path}": content for path, content in (files or {}).items()}
    return Case(name, ["run", "good.yaml"], message, given)


def config(name: str, message: str, **changes: object) -> Case:
    """A config.json with other values; the test's parent has the rest."""
    return parent(name, message, {"config.json": json.dumps(CONFIG | changes)})


def named(name: str, text: str, message: str) -> Case:
    return Case(name, ["run", "good.yaml", "--out", "new", "--set", f"parent={text}"], message)


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
GPTQ = {"quant_method": "gptq", "bits": 4}
INDEX = "model.safetensors.index.json"
ESCAPE = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
ABSOLUTE = {"weight_map": {"model.norm.weight": "/etc/passwd.safetensors"}}
HEADER_OF_A_TERABYTE = (1 << 40).to_bytes(8, "little") + b"{}"
CUT_HEADER = (100).to_bytes(8, "little") + b'{"a"'
OUTSIDE = b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'
NO_DATA = len(OUTSIDE).to_bytes(8, "little") + OUTSIDE

CASES = [
    named(
        "a parent that is nowhere",
        "./nowhere",
        "parent './nowhere': no such folder; expected `pocket`, a folder, or a hub name like org/model",
    ),
    named(
        "a parent's absolute path that is nowhere",
        "/nowhere/at/all",
        "parent '/nowhere/at/all': no such folder; expected `pocket`, a folder, or a hub name like org/model",
    ),
    named(
        "a parent in a home that is not there",
        "~/nowhere",
        "parent '…/nowhere': no such folder; expected `pocket`, a folder, or a hub name like org/model",
    ),
    named(
        "a file for a parent",
        "good.yaml",
        "parent 'good.yaml': no such folder; expected `pocket`, a folder, or a hub name like org/model",
    ),
    named(
        "a folder without a config",
        "text",
        "parent text: no config.json; expected a Hugging Face model folder",
    ),
    named(
        "a name of the hub, without a network",
        "org/no-such-model",
        "parent 'org/no-such-model': neither a folder here nor reachable on the hub (LocalEntryNotFoundError)",
    ),
    named(
        "a name of the hub with markup",
        "'<script>/x'",
        "parent '<script>/x': neither a folder here nor reachable on the hub (HFValidationError)",
    ),
    named(
        "a name of the hub with a way out",
        "../x",
        "parent '../x': no such folder; expected `pocket`, a folder, or a hub name like org/model",
    ),
    # ---------------------------------------------------------------------------------- config.json
    parent(
        "config.json: empty",
        "parent/config.json: not JSON (Expecting value: line 1 column 1 (char 0))",
        {"config.json": ""},
    ),
    parent(
        "config.json: binary",
        "parent/config.json: not JSON ('utf-8' codec can't decode byte 0x80 in position 0: invalid start byte)",
        {"config.json": b"\x80\xff\x00"},
    ),
    parent(
        "config.json: cut short",
        "parent/config.json: not JSON (Unterminated string starting at: line 1 column 16 (char 15))",
        {"config.json": '{"model_type": "lla'},
    ),
    parent(
        "config.json: a list",
        "parent/config.json: got a JSON list, expected an object",
        {"config.json": "[]"},
    ),
    parent(
        "config.json: no type",
        "parent parent: config.json: no model_type; expected that of a Hugging Face model",
        {"config.json": "{}"},
    ),
    parent(
        "config.json: nested deep",
        "parent/config.json: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string)",
        {"config.json": "[" * 100_000},
    ),
    config(
        "config.json: another family",
        "parent parent: model type 'gpt2' is not supported; supported: gemma2, gemma3_text, llama, mistral, nemotron-nas, olmo2, phi3, qwen2, qwen3 (docs/families.md shows how to add a family)",
        model_type="gpt2",
    ),
    config(
        "config.json: a family with pictures",
        "parent parent: model type 'gemma3' is not supported; supported: gemma2, gemma3_text, llama, mistral, nemotron-nas, olmo2, phi3, qwen2, qwen3 (give its text model alone (model type gemma3_text))",
        model_type="gemma3",
    ),
    config(
        "config.json: a type that is no text",
        "parent parent: model type \"['llama']\" is not supported; supported: gemma2, gemma3_text, llama, mistral, nemotron-nas, olmo2, phi3, qwen2, qwen3 (docs/families.md shows how to add a family)",
        model_type=["llama"],
    ),
    config(
        "config.json: no heads",
        "parent parent: config.json: num_attention_heads: got 0; expected a whole number from 1 to 16,384",
        num_attention_heads=0,
    ),
    config(
        "config.json: layers that are a text",
        "parent parent: config.json: num_hidden_layers: got 'four'; expected a whole number from 1 to 4,096",
        num_hidden_layers="four",
    ),
    config(
        "config.json: a billion layers",
        "parent parent: config.json: num_hidden_layers: got 1000000000; expected a whole number from 1 to 4,096",
        num_hidden_layers=10**9,
    ),
    config(
        "config.json: a width with a fraction",
        "parent parent: config.json: hidden_size: got 64.5; expected a whole number from 1 to 1,048,576",
        hidden_size=64.5,
    ),
    config(
        "config.json: a width that is true",
        "parent parent: config.json: hidden_size: got True; expected a whole number from 1 to 1,048,576",
        hidden_size=True,
    ),
    config(
        "config.json: KV heads that divide nothing",
        "parent parent: config.json: 4 attention heads cannot share 3 KV heads equally; is it the config of these weights?",
        num_key_value_heads=3,
    ),
    config(
        "config.json: heads that do not divide the width",
        "parent parent: config.json: hidden_size 64 is no multiple of 6 attention heads; expected one, or head_dim",
        num_attention_heads=6,
    ),
    config(
        "config.json: a negative vocabulary",
        "parent parent: config.json: vocab_size: got -320; expected a whole number from 1 to 16,777,216",
        vocab_size=-320,
    ),
    config(
        "config.json: positions that are none",
        "parent parent: config.json: max_position_embeddings: got 0; expected a whole number from 1 to 1,099,511,627,776",
        max_position_embeddings=0,
    ),
    config(
        "config.json: a dtype of eight bits",
        "parent parent: config.json: dtype: got 'float8_e4m3fn'; expected one of float32, bfloat16, float16",
        dtype="float8_e4m3fn",
    ),
    config(
        "config.json: a dtype that is none",
        "parent parent: config.json: dtype: got 'float31'; expected one of float32, bfloat16, float16",
        dtype="float31",
    ),
    config(
        "config.json: another activation",
        "parent parent: config.json cannot be understood (KeyError: 'sigmoidal'); expected the config of a Hugging Face model",
        hidden_act="sigmoidal",
    ),
    config(
        "config.json: biases in the FFN",
        "parent parent: Llama with mlp_bias is not supported",
        mlp_bias=True,
    ),
    config(
        "config.json: rope of another kind",
        "parent parent: config.json cannot be understood (KeyError: 'spiral'); expected the config of a Hugging Face model",
        rope_parameters={"rope_type": "spiral"},
    ),
    config(
        "config.json: quantised",
        "parent parent: its weights are quantised (GPTQ, 4 bits); expected float32, bfloat16 or float16: give the checkpoint they were made from, and quantise the child",
        quantization_config=GPTQ,
    ),
    config(
        "config.json: quantised somehow",
        "parent parent: its weights are quantised (by its quantization_config); expected float32, bfloat16 or float16: give the checkpoint they were made from, and quantise the child",
        quantization_config="yes",
    ),
    config(
        "config.json: padding outside of the vocabulary",
        "parent parent: config.json cannot be understood (Padding_idx must be within num_embeddings); expected the config of a Hugging Face model",
        pad_token_id=999,
    ),
    # -------------------------------------------------------------------------------------- weights
    config(
        "weights of a narrower model",
        "parent parent: weights and config.json differ: model.layers.0.mlp.down_proj.weight is 64 x 96 in model.safetensors, but 64 x 128 by config.json",
        intermediate_size=128,
    ),
    config(
        "weights of a smaller vocabulary",
        "parent parent: weights and config.json differ: model.embed_tokens.weight is 320 x 64 in model.safetensors, but 640 x 64 by config.json",
        vocab_size=640,
    ),
    config(
        "weights of fewer layers",
        "parent parent: weights and config.json differ: model.layers.4.self_attn.q_proj.weight is missing; is a shard, or is config.json another's?",
        num_hidden_layers=6,
    ),
    config(
        "weights of more layers",
        "parent parent: weights and config.json differ: model.layers.2.input_layernorm.weight is there, but config.json says 2 layers",
        num_hidden_layers=2,
    ),
    config(
        "weights without a head",
        "parent parent: weights and config.json differ: lm_head.weight is missing; is a shard, or is config.json another's?",
        tie_word_embeddings=False,
    ),
    parent(
        "weights: empty",
        "parent/model.safetensors: not a readable safetensors file (Error while deserializing header: header too small)",
        {"model.safetensors": b""},
    ),
    parent(
        "weights: a text",
        "parent/model.safetensors: not a readable safetensors file (Error while deserializing header: header too large)",
        {"model.safetensors": b"not weights at all"},
    ),
    parent(
        "weights: a header of a terabyte",
        "parent/model.safetensors: not a readable safetensors file (Error while deserializing header: header too large)",
        {"model.safetensors": HEADER_OF_A_TERABYTE},
    ),
    parent(
        "weights: a header that is cut",
        "parent/model.safetensors: not a readable safetensors file (Error while deserializing header: invalid header length)",
        {"model.safetensors": CUT_HEADER},
    ),
    parent(
        "weights: no data",
        "parent/model.safetensors: not a readable safetensors file (Error while deserializing header: incomplete metadata, file not fully covered)",
        {"model.safetensors": NO_DATA},
    ),
    parent(
        "index: not JSON",
        "parent/model.safetensors.index.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        {INDEX: "{"},
    ),
    parent(
        "index: no map",
        "parent/model.safetensors.index.json: no weight_map; expected a file's name for every tensor",
        {INDEX: "{}"},
    ),
    parent(
        "index: a map that is a list",
        "parent/model.safetensors.index.json: no weight_map; expected a file's name for every tensor",
        {INDEX: '{"weight_map": []}'},
    ),
    parent(
        "index: a way out",
        "parent/model.safetensors.index.json: 'model.norm.weight' is in '../secret.safetensors'; expected the name of a safetensors file beside the index",
        {INDEX: json.dumps(ESCAPE)},
    ),
    parent(
        "index: an absolute path",
        "parent/model.safetensors.index.json: 'model.norm.weight' is in '/etc/passwd.safetensors'; expected the name of a safetensors file beside the index",
        {INDEX: json.dumps(ABSOLUTE)},
    ),
    parent(
        "index: a number for a file",
        "parent/model.safetensors.index.json: 'a' is in 3; expected the name of a safetensors file beside the index",
        {INDEX: '{"weight_map": {"a": 3}}'},
    ),
    parent(
        "index: a shard that is not there",
        "parent/model.safetensors.index.json: b.safetensors is not there; is the download complete?",
        {INDEX: '{"weight_map": {"a": "b.safetensors"}}'},
    ),
    parent(
        "index: a tensor that is not there",
        "parent/model.safetensors: lacks a, which model.safetensors.index.json says is in it; download both again",
        {INDEX: '{"weight_map": {"a": "model.safetensors"}}'},
    ),
    # ------------------------------------------------------------------------------------ tokenizer
    parent(
        "tokenizer: not JSON",
        "parent parent: cannot load its tokenizer: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); expected tokenizer.json and tokenizer_config.json as transformers writes them",
        {"tokenizer.json": "{"},
    ),
    parent(
        "tokenizer: binary",
        "parent parent: cannot load its tokenizer: 'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte; expected tokenizer.json and tokenizer_config.json as transformers writes them",
        {"tokenizer.json": b"\x80\xff"},
    ),
    parent(
        "tokenizer: an empty object",
        "parent parent: cannot load its tokenizer: KeyError: 'added_tokens'; expected tokenizer.json and tokenizer_config.json as transformers writes them",
        {"tokenizer.json": "{}"},
    ),
    parent(
        "tokenizer: a config that is a list",
        "parent parent: cannot load its tokenizer: AttributeError: 'list' object has no attribute 'get'; expected tokenizer.json and tokenizer_config.json as transformers writes them",
        {"tokenizer_config.json": "[]"},
    ),
    parent(
        "tokenizer: a config that is not JSON",
        "parent parent: cannot load its tokenizer: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); expected tokenizer.json and tokenizer_config.json as transformers writes them",
        {"tokenizer_config.json": "{"},
    ),
    parent(
        "tokenizer: no end of text",
        "parent parent: its tokenizer has no end-of-text token; set eos_token",
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
    ),
    parent(
        "tokenizer: code of its own",
        "parent parent: its tokenizer needs code of its own (auto_map in tokenizer_config.json), which is never run; expected one that transformers knows, as tokenizer.json",
        {
            "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}, '
            '"tokenizer_class": "Own"}',
            "own.py": "open('harm', 'w')\n",
        },
    ),
    config(
        "tokenizer of a larger vocabulary",
        "parent parent: its tokenizer has 300 tokens, its embedding only 64; give it the tokenizer it was trained with",
        vocab_size=64,
    ),
]
