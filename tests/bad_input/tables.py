"""Costs of other runs, device sheets, published block libraries, architectures."""

import json

from case import Case

SHEET = (
    "{flops_per_s: 1e12, bytes_per_s: 1e9, step_overhead_s: 0, memory_bytes: 1e9, host_bytes: 1e9, "
    "devices: 1, interconnect_bytes_per_s: 1e9, network_bytes_per_s: 1e9, "
    "host_link_bytes_per_s: 1e9, disk_bytes_per_s: 1e9}"
)


def variant(kl: float, ms: float) -> dict[str, dict[str, float]]:
    return {"stats": {"runtime_ms": ms}, "metrics": {"kl_div": kl}}


LIBRARY = {f"layer_{i}": {"parent": variant(0, 10), "none": variant(4, 0)} for i in range(3)}
ASK = ["--minimize", "metrics.kl_div", "--max", "stats.runtime_ms=20"]
HEADER = {
    "engine": {"engine": "roofline", "version": "1", "device": "moon", "count": 1},
    "measured": False,
    "scenarios": {"main": {}},
    "shape": {},
    "windows": [],
}


def published(name: str, content: object, message: str, *arguments: str) -> Case:
    """A question to a table that is wrong."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    command = ["search", "--table", "table.json", *(arguments or ASK)]
    return Case(f"table: {name}", command, message, {"table.json": text})


def question(name: str, message: str, *arguments: str) -> Case:
    """A wrong question to a good table."""
    return published(name, LIBRARY, message, *arguments)


def costs(name: str, message: str, files: dict[str, str | bytes]) -> Case:
    """A run that takes its costs from another."""
    command = ["run", "good.yaml", "--set", "cost.table=there/costs.jsonl"]
    return Case(f"costs: {name}", command, message, {f"there/{k}": v for k, v in files.items()})


def sheet(name: str, content: str | bytes, message: str) -> Case:
    """A device sheet of the user's own."""
    command = ["run", "good.yaml", "--set", "cost.device_sheet=mine.yaml"]
    return Case(f"device sheet: {name}", command, message, {"mine.yaml": content})


def plan(name: str, message: str, *arguments: str, content: str | None = None) -> Case:
    """A plan for devices that are not here."""
    files = {} if content is None else {"mine.yaml": content}
    return Case(f"plan: {name}", ["plan", "good.yaml", *arguments], message, files)


def architecture(name: str, content: str | bytes, message: str) -> Case:
    """A child that is given block by block in a file."""
    command = ["child", "run", "--name", "a", "--architecture", "blocks.json"]
    return Case(f"architecture: {name}", command, message, {"blocks.json": content})


CASES = [
    Case(
        "table: nowhere",
        ["search", "--table", "nowhere.json", *ASK],
        "table nowhere.json: no such file",
    ),
    Case(
        "table: a folder",
        ["search", "--table", "text", *ASK],
        "table text: is a folder; expected a JSON file",
    ),
    published(
        "not JSON",
        "{",
        "table table.json: not a JSON file (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    ),
    published(
        "binary",
        b"\x80\xff",
        "table table.json: not a JSON file ('utf-8' codec can't decode byte 0x80 in position 0: invalid start byte)",
    ),
    published(
        "nested deep", "[" * 100_000, "table table.json: not a JSON file (nested too deeply)"
    ),
    published("a list", [], "table table.json: got list, expected an object of layers"),
    published("empty", {}, "table table.json: got no layers, expected an object of layers"),
    published(
        "a layer that is a list",
        {"layer_0": []},
        "table table.json, layer_0: expected an object of variants, got []",
    ),
    published(
        "a layer without variants",
        {"layer_0": {}},
        "table table.json, layer_0: expected an object of variants, got {}",
    ),
    published(
        "a variant that is a number",
        {"layer_0": {"a": 3}},
        "table table.json, layer_0, 'a': expected an object of figures",
    ),
    published(
        "a layer twice",
        '{"layer_0": {"a": {}}, "layer_0": {"a": {}}}',
        "table table.json: 'layer_0' appears more than once; every name must be unique",
    ),
    published(
        "a variant twice",
        '{"layer_0": {"a": {}, "a": {}}}',
        "table table.json: 'a' appears more than once; every name must be unique",
    ),
    published(
        "a layer that is missing",
        {"layer_0": {"a": {}}, "layer_2": {"a": {}}},
        "table table.json: layer_1 is missing; expected every layer from 0 to 2",
    ),
    published(
        "layers numbered by a stranger",
        {"layer_0": {"a": {}}, "layer_99999999": {}},
        "table table.json: layer_1 is missing; expected every layer from 0 to 99999999",
    ),
    published(
        "a layer's number without end",
        {"layer_" + "9" * 5000: {"a": {}}},
        "table, layer_…, 'a': has no 'metrics.kl_div'; it has no figures",
    ),
    published(
        "a figure that is a text",
        {"layer_0": {"a": {"metrics": {"kl_div": "low"}}}},
        "table, layer_0, 'a': metrics.kl_div is 'low'; expected a finite number",
    ),
    published(
        "a figure that is NaN",
        '{"layer_0": {"a": {"metrics": {"kl_div": NaN}}}}',
        "table, layer_0, 'a': metrics.kl_div is nan; expected a finite number",
    ),
    published(
        "a figure that is true",
        {"layer_0": {"a": {"metrics": {"kl_div": True}}}},
        "table, layer_0, 'a': metrics.kl_div is True; expected a finite number",
    ),
    published(
        "a figure without end",
        '{"layer_0": {"a": {"k": ' + "9" * 5000 + "}}}",
        "table table.json: not a JSON file (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit)",
    ),
    published(
        "a figure beyond floats",
        '{"layer_0": {"a": {"metrics": {"kl_div": 1' + "0" * 400 + "}}}}",
        "table, layer_0, 'a': metrics.kl_div is 10000000000000000000000000000000000000000000000000000000000000000000000000000000; expected a finite number",
    ),
    published(
        "a time below 0",
        {"layer_0": {"a": variant(0, -1)}},
        "table: stats.runtime_ms is -1 somewhere; expected resources of at least 0",
    ),
    published(
        "a variant with markup",
        {"layer_0": {"<b>x</b>": {"metrics": {}}}},
        "table, layer_0, '<b>x</b>': has no 'metrics.kl_div'; it has no figures",
    ),
    published(
        "a name that moves the cursor",
        {"layer_0": {"a\x1b[2J\x1b]0;title\x07": {"metrics": {}}}},
        "table, layer_0, …: has no 'metrics.kl_div'; it has no figures",
    ),
    published(
        "a layer that moves the cursor",
        {"x\x1b[2J": []},
        "table table.json, x\\x1b[2J: expected an object of variants, got []",
    ),
    question(
        "a key that it has not",
        "table, layer_0, 'parent': has no 'metrics.kl'; expected one of: stats.runtime_ms, metrics.kl_div",
        "--minimize",
        "metrics.kl",
    ),
    question(
        "nothing to minimize",
        "search --table: expected one of --minimize KEY and --maximize KEY, e.g. --minimize metrics.kl_div",
        "--max",
        "stats.runtime_ms=20",
    ),
    question(
        "two directions",
        "search --table: expected one of --minimize KEY and --maximize KEY, e.g. --minimize metrics.kl_div",
        "--minimize",
        "a",
        "--maximize",
        "b",
    ),
    question(
        "a bound without a number",
        "--max 'stats.runtime_ms': expected KEY=NUMBER, for example --max stats.runtime_ms=32679",
        *ASK[:2],
        "--max",
        "stats.runtime_ms",
    ),
    question(
        "a bound that is NaN",
        "--max 'stats.runtime_ms=nan': expected KEY=NUMBER, for example --max stats.runtime_ms=32679",
        *ASK[:2],
        "--max",
        "stats.runtime_ms=nan",
    ),
    question(
        "a bound that is a text",
        "--min 'stats.runtime_ms=fast': expected KEY=NUMBER, for example --min stats.runtime_ms=32679",
        *ASK[:2],
        "--min",
        "stats.runtime_ms=fast",
    ),
    question(
        "more differences than layers",
        "--diversity: got 9.0, expected a share, or 1 to 3 layers",
        *ASK,
        "--solutions",
        "2",
        "--diversity",
        "9",
    ),
    question(
        "no difference",
        "--diversity: got 0.0, expected a share, or 1 to 3 layers",
        *ASK,
        "--solutions",
        "2",
        "--diversity",
        "0",
    ),
    question(
        "a gap below 0",
        "search --gap: got -1.0, expected a share of at least 0",
        *ASK,
        "--gap",
        "-1",
    ),
    question(
        "a gap that is NaN",
        "search --gap: got nan, expected a share of at least 0",
        *ASK,
        "--gap",
        "nan",
    ),
    question(
        "no solutions", "search --solutions: got 0, expected at least 1", *ASK, "--solutions", "0"
    ),
    question(
        "a wish for a run",
        "search --table: takes --minimize or --maximize, --max, --min, --gap, --solutions, --diversity",
        *ASK,
        "--throughput",
        "2x",
    ),
    question(
        "a run as well",
        "search --table: takes --minimize or --maximize, --max, --min, --gap, --solutions, --diversity",
        *ASK,
        "run",
    ),
    # ----------------------------------------------------------------------------- costs and sheets
    costs(
        "nowhere",
        "cost.table there/costs.jsonl: no such file; expected a costs.jsonl of an earlier run",
        {},
    ),
    costs(
        "a folder",
        "cost.table there/costs.jsonl: no such file; expected a costs.jsonl of an earlier run",
        {"costs.jsonl/x": ""},
    ),
    costs(
        "no header",
        "there/header.json: no such file; run the stage that writes it first",
        {"costs.jsonl": ""},
    ),
    costs(
        "a header that is not JSON",
        "there/header.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); expected a CostHeader",
        {"costs.jsonl": "", "header.json": "{"},
    ),
    costs(
        "a header of something else",
        "there/header.json: engine: got {'a': 1}; Field required; expected a CostHeader",
        {"costs.jsonl": "", "header.json": '{"a": 1}'},
    ),
    costs(
        "binary",
        "there/costs.jsonl, line 1: not JSON (Expecting value: line 1 column 1 (char 0)); expected a VariantCost",
        {"costs.jsonl": b"\x80\n", "header.json": json.dumps(HEADER)},
    ),
    costs(
        "lines that are not JSON",
        "there/costs.jsonl, line 1: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); expected a VariantCost",
        {"costs.jsonl": "{\n", "header.json": json.dumps(HEADER)},
    ),
    costs(
        "lines of something else",
        "there/costs.jsonl, line 1: scenario: got {'a': 1}; Field required; expected a VariantCost",
        {"costs.jsonl": '{"a": 1}\n', "header.json": json.dumps(HEADER)},
    ),
    costs(
        "of another device",
        "cost.table there/costs.jsonl: engine.device is 'moon' there but 'device.yaml' here; measure again",
        {"costs.jsonl": "", "header.json": json.dumps(HEADER)},
    ),
    sheet(
        "empty",
        "",
        "cost.device_sheet mine.yaml: no flops_per_s, bytes_per_s, step_overhead_s; expected the keys flops_per_s, bytes_per_s, step_overhead_s",
    ),
    sheet(
        "a list",
        "[1, 2]",
        "cost.device_sheet mine.yaml: got list, expected a mapping of settings such as `parent: org/model`",
    ),
    sheet(
        "not YAML",
        "{",
        "cost.device_sheet mine.yaml: not YAML: line 1: expected the node content, but found '<stream end>'",
    ),
    sheet(
        "a figure that is missing",
        "flops_per_s: 1e12\n",
        "cost.device_sheet mine.yaml: no bytes_per_s, step_overhead_s; expected the keys flops_per_s, bytes_per_s, step_overhead_s",
    ),
    sheet(
        "a figure that nobody knows",
        "{flops_per_s: 1e12, bytes_per_s: 1e9, step_overhead_s: 0, speed: 1}",
        "cost.device_sheet mine.yaml: unknown key 'speed'; expected the keys flops_per_s, bytes_per_s, step_overhead_s",
    ),
    sheet(
        "a figure that is a text",
        "{flops_per_s: many, bytes_per_s: 1e9, step_overhead_s: 0}",
        "cost.device_sheet mine.yaml: flops_per_s: got 'many'; expected a number above 0",
    ),
    sheet(
        "a device of no speed",
        "{flops_per_s: 0, bytes_per_s: 1e9, step_overhead_s: 0}",
        "cost.device_sheet mine.yaml: flops_per_s: got 0; expected a number above 0",
    ),
    sheet(
        "an endless speed",
        "{flops_per_s: .inf, bytes_per_s: 1e9, step_overhead_s: 0}",
        "cost.device_sheet mine.yaml: flops_per_s: got inf; expected a number above 0",
    ),
    # ------------------------------------------------------------------- devices that are not here
    plan(
        "an unknown device",
        "--device: got 'H1000'; expected one of this-cpu, H100, H200, B200, A100, L40S, RTX-4090, or a YAML file with the keys flops_per_s, bytes_per_s, step_overhead_s, memory_bytes, host_bytes, devices, interconnect_bytes_per_s, network_bytes_per_s, host_link_bytes_per_s, disk_bytes_per_s",
        *("--device", "H1000"),
    ),
    plan(
        "a sheet for costs alone",
        "--device mine.yaml: no memory_bytes, host_bytes, devices, interconnect_bytes_per_s, network_bytes_per_s, host_link_bytes_per_s, disk_bytes_per_s; expected the keys flops_per_s, …",
        *("--device", "mine.yaml"),
        content="{flops_per_s: 1e12, bytes_per_s: 1e9, step_overhead_s: 0}",
    ),
    plan(
        "a device without memory",
        "--device mine.yaml: memory_bytes: got 0; expected a number above 0",
        *("--device", "mine.yaml"),
        content=SHEET.replace("memory_bytes: 1e9", "memory_bytes: 0"),
    ),
    plan(
        "half a device",
        "--device mine.yaml: devices: got 1.5; expected a whole number",
        *("--device", "mine.yaml"),
        content=SHEET.replace("devices: 1", "devices: 1.5"),
    ),
    plan(
        "no devices",
        "--devices: got 0; expected 1 to 8, or a multiple of 8, which is how many H100 are in a machine",
        *("--device", "H100", "--devices", "0"),
    ),
    plan(
        "a machine and a half",
        "--devices: got 12; expected 1 to 8, or a multiple of 8, which is how many H100 are in a machine",
        *("--devices", "12"),
    ),
    plan(
        "a number of devices that is none",
        "plan: Invalid value for '--devices': …integer; see `puzzle plan --help`",
        *("--devices", "many"),
    ),
    plan(
        "memory without a unit",
        "--device-memory: got '80'; expected bytes with a unit, such as 80GiB",
        *("--device-memory", "80"),
    ),
    plan(
        "the host's memory of a machine without devices of its own",
        "--host-memory: this-cpu is the host's own device; use --device-memory",
        *("--device", "this-cpu", "--host-memory", "8GiB"),
    ),
    # -------------------------------------------------------------------------------- architectures
    Case(
        "architecture: nowhere",
        ["child", "run", "--name", "a", "--architecture", "no.json"],
        "architecture no.json: no such file; expected a JSON list of blocks",
    ),
    Case(
        "architecture: a folder",
        ["child", "run", "--name", "a", "--architecture", "text"],
        "architecture text: no such file; expected a JSON list of blocks",
    ),
    architecture(
        "not JSON", "[", "blocks.json: not JSON (Expecting value: line 1 column 2 (char 1))"
    ),
    architecture(
        "binary",
        b"\x80",
        "blocks.json: not JSON ('utf-8' codec can't decode byte 0x80 in position 0: invalid start byte)",
    ),
    architecture(
        "an object",
        "{}",
        'architecture blocks.json: expected a JSON list of blocks, one per layer, such as ["gqa_2+gated_384", ...]',
    ),
    architecture(
        "empty",
        "[]",
        'architecture blocks.json: expected a JSON list of blocks, one per layer, such as ["gqa_2+gated_384", ...]',
    ),
    architecture(
        "numbers",
        "[1, 2, 3, 4]",
        "search.architecture: block '1': expected <attention>+<ffn>, for example gqa_2+gated_384",
    ),
    architecture(
        "too few",
        '["gqa_2+gated_96"]',
        "search.architecture: got 1 blocks, expected 4: one for each layer of the parent",
    ),
    architecture(
        "half a block",
        '["gqa_2", "gqa_2", "gqa_2", "gqa_2"]',
        "search.architecture: block 'gqa_2': expected <attention>+<ffn>, for example gqa_2+gated_384",
    ),
    architecture(
        "a block of another family",
        '["mamba+gated_96", "a", "b", "c"]',
        "search.architecture: attention variant 'mamba': expected gqa_<kv heads>, linear or no_op",
    ),
    architecture(
        "no heads",
        '["gqa_0+gated_96", "gqa_2+no_op", "gqa_2+no_op", "gqa_2+no_op"]',
        "search.architecture: attention variant 'gqa_0': expected gqa_<kv heads>, linear or no_op",
    ),
    architecture(
        "a size without end",
        '["gqa_' + "9" * 5000 + '+no_op", "a", "b", "c"]',
        "search.architecture: attention variant 'gqa_…: expected gqa_<kv heads>, linear or no_op",
    ),
]
