"""Recipes, and settings on the command line."""

from case import Case, recipe, setting

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)

CASES = [
    # ------------------------------------------------------------------------------------- the file
    Case(
        "no such recipe",
        ["run", "nothing.yaml"],
        "recipe nothing.yaml: no such file; expected a YAML file or a built-in recipe (pocket-headline, pocket-wishes, pocket)",
    ),
    Case(
        "a built-in recipe misspelt",
        ["run", "pockte"],
        "recipe pockte: no such file; did you mean the built-in 'pocket'?",
    ),
    Case(
        "a folder for a recipe", ["run", "text"], "recipe text: is a folder; expected a YAML file"
    ),
    recipe("binary", b"\x80\xff\x00\x01", "recipe r.yaml: not UTF-8 text; expected a YAML file"),
    recipe(
        "a NUL", b"parent: a\x00b\n", "recipe r.yaml: not YAML: special characters are not allowed"
    ),
    recipe(
        "a list",
        "- a\n- b\n",
        "recipe r.yaml: got list, expected a mapping of settings such as `parent: org/model`",
    ),
    recipe(
        "a text",
        "pocket\n",
        "recipe r.yaml: got str, expected a mapping of settings such as `parent: org/model`",
    ),
    recipe(
        "a number",
        "3\n",
        "recipe r.yaml: got int, expected a mapping of settings such as `parent: org/model`",
    ),
    recipe(
        "two documents",
        "parent: pocket\n---\nparent: pocket\n",
        "recipe r.yaml: not YAML: line 2: but found another document",
    ),
    recipe(
        "a bracket that stays open",
        "corpus: [\n",
        "recipe r.yaml: not YAML: line 2: expected the node content, but found '<stream end>'",
    ),
    recipe(
        "a tab",
        "search:\n\tthroughput: 2x\n",
        "recipe r.yaml: not YAML: line 2: a tab; indent with spaces",
    ),
    recipe(
        "wrong indentation",
        "search:\n  throughput: 2x\n   memory: 1GiB\n",
        "recipe r.yaml: not YAML: line 3: mapping values are not allowed here",
    ),
    recipe(
        "a colon too many",
        "parent: a: b\n",
        "recipe r.yaml: not YAML: line 1: mapping values are not allowed here",
    ),
    recipe(
        "a key twice",
        "search:\n  throughput: 2x\n  throughput: 3x\n",
        "recipe r.yaml: line 3: key 'throughput' stands twice; remove one",
    ),
    recipe(
        "a section twice",
        "library: {}\nsearch: {}\nlibrary: {}\n",
        "recipe r.yaml: line 3: key 'library' stands twice; remove one",
    ),
    recipe(
        "a bomb of aliases",
        BOMB,
        "recipe r.yaml: its aliases stand for more than 100,000 values; write less",
    ),
    recipe(
        "an alias of itself", "a: &a [*a]\n", "recipe r.yaml: line 1: an alias of what it is within"
    ),
    recipe(
        "an alias of nothing",
        "a: *b\n",
        "recipe r.yaml: not YAML: line 1: found undefined alias 'b'",
    ),
    recipe(
        "nested ten thousand deep",
        "a: " + "[" * 10_000,
        "recipe r.yaml: nested too deeply; expected settings",
    ),
    recipe(
        "code in a tag",
        "parent: !!python/object/apply:os.system ['touch harm']\n",
        "recipe r.yaml: not YAML: line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    recipe(
        "a tag of another tool",
        "parent: !vault abc\n",
        "recipe r.yaml: not YAML: line 1: could not determine a constructor for the tag '!vault'",
    ),
    recipe(
        "a date that is none",
        "parent: 2024-13-45\n",
        "recipe r.yaml: not YAML: month must be in 1..12",
    ),
    recipe(
        "larger than any recipe",
        "#" * (1 << 20) + "\nparent: pocket\n",
        "recipe r.yaml: got 1,048,592 bytes, expected at most 1,048,576; is it a file of settings?",
    ),
    recipe("a key that is no text", "3: 4\n", "r.yaml: got the key 3; expected text, in quotes"),
    # ------------------------------------------------------------------------------- keys and types
    recipe(
        "an unknown key",
        "serach:\n  throughput: 2x\n",
        "r.yaml: unknown key 'serach'; did you mean 'search'?",
    ),
    recipe(
        "an unknown key in a section",
        "search:\n  throughputt: 2x\n",
        "r.yaml: unknown key 'search.throughputt'; did you mean 'throughput'?",
    ),
    recipe(
        "an unknown key far from any",
        "search:\n  zzz: 2x\n",
        "r.yaml: unknown key 'search.zzz'; expected one of: throughput, user_throughput, latency, time_to_first_token, inter_token_latency, memory, parameters, kv_cache, capacity, finalists, maximize, minimize, kl, changed_layers, homogeneous, monotone, frontier, points, architecture, gap, solutions, diversity, margin, attempts, refinements, time_limit_s",
    ),
    recipe(
        "an unknown key in a list",
        "corpus:\n  sources:\n    - paht: text\n",
        "r.yaml: unknown key 'corpus.sources.0.paht'; did you mean 'path'?",
    ),
    recipe(
        "an unknown key of a child",
        "children:\n  fast:\n    serach: {}\n",
        "r.yaml: unknown key 'children.fast.serach'; did you mean 'search'?",
    ),
    recipe(
        "an unknown key of a child's search",
        "children: {a: {search: {speed: 2x}}}\n",
        "r.yaml: children.a: unknown key 'search.speed'; expected one of: throughput, user_throughput, latency, time_to_first_token, inter_token_latency, memory, parameters, kv_cache, capacity, finalists, maximize, minimize, kl, changed_layers, homogeneous, monotone, frontier, points, architecture, gap, solutions, diversity, margin, attempts, refinements, time_limit_s",
    ),
    recipe(
        "a section without settings",
        "search:\n",
        "r.yaml: search: got nothing; expected a mapping of settings",
    ),
    recipe(
        "a section that is a list",
        "search:\n  - throughput: 2x\n",
        "r.yaml: search: got [{'throughput': '2x'}]; expected a mapping of settings",
    ),
    recipe(
        "a section that is a number",
        "library: 3\n",
        "r.yaml: library: got 3; expected a mapping of settings",
    ),
    recipe(
        "a list that is a number",
        "library:\n  ffn_percent: 50\n",
        "r.yaml: library.ffn_percent: got 50; expected a list, such as [50]",
    ),
    recipe(
        "a number that is a text",
        "library:\n  tokens: many\n",
        "r.yaml: library.tokens: got 'many'; expected a whole number",
    ),
    recipe(
        "a number with a unit",
        "library:\n  tokens: 10M\n",
        "r.yaml: library.tokens: got '10M'; expected a whole number, written 10000000",
    ),
    recipe(
        "a whole number that YAML reads as text",
        "library:\n  tokens: 1e6\n",
        "r.yaml: library.tokens: got '1e6'; expected a whole number, written 1000000",
    ),
    recipe(
        "a whole number with a fraction",
        "library:\n  tokens: 1.5\n",
        "r.yaml: library.tokens: got 1.5; expected a whole number",
    ),
    recipe(
        "a number that is a truth value",
        "library:\n  tokens: yes\n",
        "r.yaml: library.tokens: got true; expected no truth value; YAML reads yes, no, on and off as true and false: write it in quotes if it is meant as text",
    ),
    recipe(
        "a list of truth values",
        "library:\n  kv_heads: [on]\n",
        "r.yaml: library.kv_heads: got [True]; expected no truth value; YAML reads yes, no, on and off as true and false: write it in quotes if it is meant as text",
    ),
    recipe(
        "a text that is a truth value",
        "parent: no\n",
        "r.yaml: parent: got false; expected no truth value; YAML reads yes, no, on and off as true and false: write it in quotes if it is meant as text",
    ),
    recipe(
        "a text that is a number",
        "parent: 7\n",
        "r.yaml: parent: got 7; expected text, in quotes: '7'",
    ),
    recipe(
        "a text that is a date",
        "parent: 2024-01-31\n",
        "r.yaml: parent: got 2024-01-31; expected text, in quotes: '2024-01-31'",
    ),
    recipe("nothing for a text", "parent:\n", "r.yaml: parent: got nothing; expected text"),
    recipe("an empty text", "parent: ''\n", "r.yaml: parent: got ''; expected a path, or a name"),
    recipe(
        "a truth value that is a number",
        "search:\n  homogeneous: 3\n",
        "r.yaml: search.homogeneous: got 3; expected true or false",
    ),
    recipe(
        "a choice that is none",
        "cost:\n  engine: vlm\n",
        "r.yaml: cost.engine: got 'vlm'; expected 'auto', 'vllm', 'torch' or 'roofline'; did you mean 'vllm'?",
    ),
    recipe(
        "a choice far from any",
        "uptrain:\n  schedule: stairs\n",
        "r.yaml: uptrain.schedule: got 'stairs'; expected 'cosine' or 'wsd'",
    ),
    recipe(
        "deploy that is a text",
        "deploy: vllm\n",
        "r.yaml: deploy: got 'vllm'; expected a list, such as [vllm]",
    ),
    recipe(
        "deploy to a stranger",
        "deploy: [sglang]\n",
        "r.yaml: deploy.0: got 'sglang'; expected 'vllm', 'vllm-plugin', 'llama.cpp' or 'transformers'",
    ),
    # ----------------------------------------------------------------------------------- quantities
    recipe(
        "a wish without a unit",
        "search:\n  throughput: 2\n",
        "r.yaml: search.throughput: got 2; expected a number with a unit, or relative to the parent: 2x",
    ),
    recipe(
        "a wish without a unit, with a fraction",
        "search:\n  memory: 0.5\n",
        "r.yaml: search.memory: got 0.5; expected a number with a unit, or relative to the parent: 0.5x",
    ),
    recipe(
        "a wish that is a list",
        "search:\n  throughput: [2x]\n",
        "r.yaml: search.throughput: got ['2x']; expected a number with a unit, or relative to the parent: 2x",
    ),
    recipe(
        "a child's wish without a unit",
        "children: {a: {search: {throughput: 2}}}\n",
        "r.yaml: children.a: search.throughput: got 2; expected a number with a unit, or relative to the parent: 2x",
    ),
    setting(
        "search.throughput=fast",
        "search.throughput: got 'fast'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.inter_token_latency=30ms p42",
        "search.inter_token_latency: got '30ms p42'; expected a percentile of p50, p90, p95, p99",
    ),
    setting(
        "search.throughput=2x p95",
        "search.throughput: got '2x p95'; it has no percentiles, which user_throughput, time_to_first_token, inter_token_latency have",
    ),
    setting(
        "search.throughput=2X",
        "search.throughput: got '2X'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%); did you mean 2x?",
    ),
    setting(
        "search.throughput=-2x",
        "search.throughput: got '-2x'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.throughput=0x",
        "search.throughput: got '0x'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.throughput=1e999x",
        "search.throughput: got '1e999x'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.throughput=40GiB",
        "search.throughput: got '40GiB'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.memory=40gib",
        "search.memory: got '40gib'; expected a number with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB) or relative to the parent (2x, 50%); did you mean 40GiB?",
    ),
    setting(
        "search.memory='40'",
        "search.memory: got '40'; expected a number with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.latency=3 parsecs",
        "search.latency: got '3 parsecs'; expected a number with a unit (s, ms, us, min) or relative to the parent (2x, 50%)",
    ),
    setting(
        "search.throughput={chat: 2x}",
        "search.throughput: no scenario 'chat'; expected one of main",
    ),
    setting(
        "search.throughput=null",
        "search: no constraint is set; set at least one of throughput, user_throughput, latency, time_to_first_token, inter_token_latency, memory, parameters, kv_cache, for example throughput: 2x",
    ),
    setting(
        "search.kl=0.2",
        "--set 'search.kl=0.2': search: kl and one of maximize and minimize go together, for example {maximize: throughput, kl: 0.15}",
    ),
    setting(
        "search.maximize=throughput",
        "--set 'search.maximize=throughput': search: kl and one of maximize and minimize go together, for example {maximize: throughput, kl: 0.15}",
    ),
    setting(
        "search.maximize=speed",
        "--set 'search.maximize=speed': search.maximize: got 'speed'; expected 'throughput' or 'user_throughput'",
    ),
    # --------------------------------------------------------------------------- impossible figures
    setting(
        "library.tokens=-3",
        "--set 'library.tokens=-3': library.tokens: got -3; expected more than 0",
    ),
    setting(
        "library.tokens=0", "--set 'library.tokens=0': library.tokens: got 0; expected more than 0"
    ),
    setting(
        "library.tokens=1000000000000000000000",
        "--set 'library.tokens=1000000000000000000000': library.tokens: got 1000000000000000000000; expected at most 1,000,000,000,000,000",
    ),
    setting(
        "library.learning_rate=.inf",
        "--set 'library.learning_rate=.inf': library.learning_rate: got inf; expected a finite number",
    ),
    setting(
        "library.learning_rate=.nan",
        "--set 'library.learning_rate=.nan': library.learning_rate: got nan; expected a finite number",
    ),
    setting(
        "library.learning_rate=0",
        "--set 'library.learning_rate=0': library.learning_rate: got 0; expected more than 0",
    ),
    setting(
        "library.warmup_share=1",
        "--set 'library.warmup_share=1': library.warmup_share: got 1; expected less than 1",
    ),
    setting(
        "library.ffn_percent=[120]",
        "--set 'library.ffn_percent=[120]': library.ffn_percent.0: got 120; expected at most 100",
    ),
    setting(
        "library.kv_heads=[3]",
        "library.kv_heads: got 3, but the parent has 2 KV heads; expected divisors of it: [2, 1]",
    ),
    setting(
        "library.kv_heads=[-1]",
        "--set 'library.kv_heads=[-1]': library.kv_heads.0: got -1; expected more than 0",
    ),
    setting(
        "library.kv_heads=two",
        "--set 'library.kv_heads=two': library.kv_heads: got 'two'; expected 'divisors' or a list",
    ),
    setting(
        "library.layers={9: parent}",
        "library.layers: got layer 9, expected 0 to 3 (the parent's layers)",
    ),
    setting(
        "library.layers={1: {attention: [gqa_7]}}",
        "library.layers.1.attention: got 'gqa_7', expected one of the space's: gqa_2, gqa_1, linear, no_op",
    ),
    setting(
        "library.budgets={lienar: 10}",
        "library.budgets: got 'lienar', expected attention, ffn or a variant of the space: attention.gqa_1, attention.gqa_2, attention.linear, attention.no_op, ffn.gated_64, ffn.gated_96, ffn.linear, ffn.no_op, gated_64, gated_96, gqa_1, gqa_2, linear, no_op",
    ),
    setting(
        "corpus.held_out_fraction=1.5",
        "--set 'corpus.held_out_fraction=1.5': corpus.held_out_fraction: got 1.5; expected less than 1",
    ),
    setting(
        "corpus.sequence_length=1",
        "--set 'corpus.sequence_length=1': corpus.sequence_length: got 1; expected at least 2",
    ),
    setting(
        "corpus.sequence_length=1024",
        "corpus.sequence_length: got 1024, but the parent takes at most 256 positions",
    ),
    setting(
        "corpus.sources=[]",
        "--set 'corpus.sources=[]': corpus.sources: got []; expected at least one entry",
    ),
    setting(
        "corpus.sources=[{weight: 2}]",
        "--set 'corpus.sources=[{weight: 2}]': corpus.sources.0: got none of them; a source is exactly one of stdlib, parent, path, dataset",
    ),
    setting(
        "corpus.sources=[{path: a, dataset: b}]",
        "--set 'corpus.sources=[{path: a, dataset: b}]': corpus.sources.0: got path and dataset; a source is exactly one of stdlib, parent, path, dataset",
    ),
    setting(
        "corpus.sources=[parent, {parent: true, temperature: 2}]",
        "--set 'corpus.sources=[parent, {parent: true, temperature: 2}]': corpus: sources: got `parent` more than once; expected it once at most: put all prompts into one file",
    ),
    setting(
        "evaluate.tasks=[a/one.yaml, {task: b/one.yaml, limit: 3}]",
        "--set 'evaluate.tasks=[a/one.yaml, {task: b/one.yaml, limit: 3}]': evaluate: tasks: got two whose results would be named one; expected different names or different `shots`",
    ),
    setting(
        "corpus.sources=[{path: text, weight: 0}]",
        "--set 'corpus.sources=[{path: text, weight: 0}]': corpus.sources.0.weight: got 0; expected more than 0",
    ),
    setting(
        "score.assembled=3",
        "--set 'score.assembled=3': score.assembled: got 3; expected 0, or at least 4",
    ),
    setting(
        "score.metric=task",
        "--set 'score.metric=task': score: metric task needs a task, for example task: held-out",
    ),
    setting(
        "score.metric=perplexity",
        "--set 'score.metric=perplexity': score.metric: got 'perplexity'; expected 'kl', 'lm_loss', 'top1', 'top5', 'top10', 'cosine' or 'task'",
    ),
    setting("cost.starts=1", "--set 'cost.starts=1': cost.starts: got 1; expected at least 2"),
    setting(
        "cost.scenario.batch_size=0",
        "--set 'cost.scenario.batch_size=0': cost.scenario.batch_size: got 0; expected more than 0",
    ),
    setting(
        "cost.scenario.input_length=4096",
        "cost scenario main (input_length + output_length): got 4112, but the parent takes at most 256 positions",
    ),
    setting(
        "cost.scenarios={main: {}}",
        "--set 'cost.scenarios={main: {}}': cost: scenarios: `main` is the one under `scenario`; choose another name",
    ),
    setting(
        "cost.scenarios={a b: {}}",
        "--set 'cost.scenarios={a b: {}}': cost.scenarios: got 'a b'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    setting(
        "cost.device_sheet=moon",
        "cost.device_sheet: got 'moon'; expected one of this-cpu, H100, H200, B200, A100, L40S, RTX-4090, or a YAML file with the keys flops_per_s, bytes_per_s, step_overhead_s",
    ),
    setting(
        "search.margin=0.5",
        "--set 'search.margin=0.5': search.margin: got 0.5; expected less than 0.5",
    ),
    setting(
        "search.solutions=0",
        "--set 'search.solutions=0': search.solutions: got 0; expected more than 0",
    ),
    setting(
        "search.diversity=0",
        "--set 'search.diversity=0': search.diversity: got 0; expected more than 0",
    ),
    setting(
        "search.architecture=[]",
        "search.architecture: got 0 blocks, expected 4: one for each layer of the parent",
    ),
    setting(
        "search.architecture=[gqa_2+gated_96]",
        "search.architecture: got 1 blocks, expected 4: one for each layer of the parent",
    ),
    setting(
        "search.architecture=[a, b, c, d]",
        "search.architecture: block 'a': expected <attention>+<ffn>, for example gqa_2+gated_384",
    ),
    setting(
        "search.architecture=[gqa_2+gated_97, gqa_2, no_op+no_op, no_op+no_op]",
        "search.architecture: block 'gqa_2': expected <attention>+<ffn>, for example gqa_2+gated_384",
    ),
    setting(
        "search.architecture=[gqa_2+gated_90,gqa_2+no_op,no_op+no_op,no_op+no_op]",
        "search.architecture: layer 0: got 'gqa_2+gated_90', which is not in the search space; expected one of its 16, such as gqa_2+gated_96, gqa_2+gated_64, gqa_1+gated_96",
    ),
    setting(
        "search.architecture=blocks.json",
        "--set 'search.architecture=blocks.json': search.architecture: got 'blocks.json'; expected a list of blocks, one for each layer; a file of them is for `puzzle child RUN --name NAME --architecture FILE`",
    ),
    setting(
        "uptrain.kl_weight=-1",
        "--set 'uptrain.kl_weight=-1': uptrain.kl_weight: got -1; expected at least 0",
    ),
    setting(
        "uptrain={kl_weight: 0, cosine_weight: 0}",
        "--set 'uptrain={kl_weight: 0, cosine_weight: 0}': uptrain: cosine_weight, kl_weight and lm_weight are all 0: there is nothing to learn; set one of them",
    ),
    setting(
        "uptrain={schedule: wsd, warmup_share: 0.9, decay_share: 0.9}",
        "--set 'uptrain={schedule: wsd, warmup_share: 0.9, decay_share: 0.9}': uptrain: warmup_share + decay_share exceed 1; lower one of them",
    ),
    setting(
        "uptrain.stages=[{share: 1}]",
        "--set 'uptrain.stages=[{share: 1}]': uptrain.stages.0.sequence_length is missing; give it a value",
    ),
    setting(
        "uptrain.stages=[{share: 1, sequence_length: 33}]",
        "uptrain.stages: got sequence_length 33; expected a multiple of corpus.sequence_length (32) that divides a batch of 8 x 32 tokens; change uptrain.batch_sequences",
    ),
    setting(
        "uptrain.freeze=['*nothing*']",
        "uptrain.freeze: '*nothing*' matches no weight; expected a pattern such as 'model.layers.0.*' or '*embed_tokens*'",
    ),
    setting(
        "processes=3",
        "uptrain.batch_sequences: a batch of 8 sequences cannot be shared by 3 processes equally; choose a multiple, or other `processes`",
    ),
    setting(
        "processes=0",
        "--set 'processes=0': processes: got 0; expected 'auto' or more than 0",
    ),
    setting("device=gpu", "device: got 'gpu', expected auto, cpu, cuda or cuda:NUMBER"),
    setting(
        "device=cuda:99",
        "device 'cuda:99': Torch not compiled with CUDA enabled; use device=auto or device=cpu",
    ),
    setting(
        "precision=float8",
        "--set 'precision=float8': precision: got 'float8'; expected 'auto', 'float32' or 'bfloat16'; did you mean 'float32'?",
    ),
    setting(
        "places={here: {}}",
        "--set 'places={here: {}}': places: `here` is the recipe's own deploy and cost; choose another name",
    ),
    setting(
        "places={../x: {}}",
        "--set 'places={../x: {}}': places: got '../x'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    setting(
        "children={'<b>': {}}",
        "--set \"children={'<b>': {}}\": children: got '<b>'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    setting(
        "children={a: {place: moon}}",
        "--set 'children={a: {place: moon}}': children.a: no place 'moon'; expected here",
    ),
    setting(
        "children={a: {place: ../x}}",
        "--set 'children={a: {place: ../x}}': children.a.place: got '../x'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    # --------------------------------------------------------------------------------- --set itself
    setting("search", "--set 'search': expected KEY=VALUE, for example --set search.throughput=2x"),
    setting("=3", "--set '=3': expected KEY=VALUE, for example --set search.throughput=2x"),
    setting(
        "search.throughput={",
        "--set 'search.throughput={': not YAML: line 1: expected the node content, but found '<stream end>'",
    ),
    setting(
        "search.troughput=2x",
        "--set 'search.troughput=2x': unknown key 'search.troughput'; did you mean 'throughput'?",
    ),
    setting(
        "search.throughput=2",
        "--set 'search.throughput=2': search.throughput: got 2; expected a number with a unit, or relative to the parent: 2x",
    ),
    setting(
        "search.throughput.main.x=2x",
        "--set 'search.throughput.main.x=2x': search.throughput.main: got {'x': '2x'}; expected text",
    ),
    setting(
        "corpus.sources.0.path=text",
        "--set 'corpus.sources.0.path=text': corpus.sources: got {'0': {'path': 'text'}}; expected a list",
    ),
    setting("parent.name=x", "--set 'parent.name=x': parent: got {'name': 'x'}; expected text"),
    setting("out=", "--set 'out=': out: got nothing; expected text"),
    setting(
        "out=~nobody-here/x",
        "--set 'out=~nobody-here/x': out: got '~nobody-here/x'; expected a path; no user of that name has a home folder here",
    ),
    Case(
        "a wrong file is not blamed on --set",
        ["run", "r.yaml", "--set", "search.gap=0"],
        "r.yaml: search: kl and one of maximize and minimize go together, for example {maximize: throughput, kl: 0.15}",
        {"r.yaml": "search:\n  kl: 0.2\n"},
    ),
    Case(
        "the wrong one of two --set",
        ["run", "good.yaml", "--set", "library.tokens=100", "--set", "cost.starts=x"],
        "--set 'cost.starts=x': cost.starts: got 'x'; expected a whole number",
    ),
]
