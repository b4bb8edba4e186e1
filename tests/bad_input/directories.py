"""Run directories, children and places, options, and what the machine refuses."""

from case import Case

RUN = "parent: parent\nout: run\n"

CASES = [
    Case(
        "no such command",
        ["serch"],
        "No such command 'serch'. Did you mean 'search', 'serve'?; see `puzzle --help`",
    ),
    Case(
        "no such option",
        ["run", "--ouut", "x"],
        "run: No such option: --ouut (Possible options: --out, --quiet); see `puzzle run --help`",
    ),
    Case(
        "an option without its value",
        ["run", "--out"],
        "Option '--out' requires an argument; see `puzzle --help`",
    ),
    Case(
        "an argument too many",
        ["status", "run", "run"],
        "status: Got unexpected extra argument(s) (run); see `puzzle status --help`",
    ),
    Case(
        "an argument that is missing",
        ["status"],
        "status: Missing argument 'RUN'; see `puzzle status --help`",
    ),
    Case(
        "a port too high",
        ["serve", "run", "--port", "99999"],
        "serve: Invalid value for '--port': Input should be less than or equal to 65535; see `puzzle serve --help`",
    ),
    Case(
        "a port that is 0",
        ["serve", "run", "--port", "0"],
        "serve: Invalid value for '--port': Input should be greater than or equal to 1; see `puzzle serve --help`",
    ),
    Case(
        "a port that is a text",
        ["serve", "run", "--port", "http"],
        "serve: Invalid value for '--port': Input should be a valid integer, unable to parse string as an integer; see `puzzle serve --help`",
    ),
    Case(
        "serve before there is a child",
        ["serve", "run"],
        "run run: child main is not made yet; run `puzzle run` first",
    ),
    Case(
        "a solution below 0",
        ["child", "run", "--name", "a", "--solution", "-1"],
        "child: Invalid value for '--solution': Input should be greater than or equal to 0; see `puzzle child --help`",
    ),
    Case(
        "a KL that is a text",
        ["search", "run", "--kl", "low"],
        "search: Invalid value for '--kl': Input should be a valid number, unable to parse string as a number; see `puzzle search --help`",
    ),
    Case(
        "no starts",
        ["measure", "parent", "--parent", "parent", "--starts", "0"],
        "measure: Invalid value for '--starts': Input should be greater than or equal to 1; see `puzzle measure --help`",
    ),
    # ------------------------------------------------------------------------------ run directories
    Case(
        "a run that is nowhere",
        ["status", "nowhere"],
        "run nowhere: no run.yaml there; expected the directory of a `puzzle run`",
    ),
    Case(
        "a run at a user's home that is none",
        ["status", "~nobody-here/run"],
        "~nobody-here/run: no user of that name has a home folder here",
    ),
    Case(
        "a run that is a file",
        ["status", "good.yaml"],
        "run good.yaml: no run.yaml there; expected the directory of a `puzzle run`",
    ),
    Case(
        "a run that is another folder",
        ["children", "text"],
        "run text: no run.yaml there; expected the directory of a `puzzle run`",
    ),
    Case(
        "a run.yaml that is a folder",
        ["status", "text"],
        "run text: no run.yaml there; expected the directory of a `puzzle run`",
        {"text/run.yaml/x": ""},
    ),
    Case(
        "a run.yaml that is not YAML",
        ["status", "run"],
        "run run/run.yaml: not YAML: line 1: expected the node content, but found '<stream end>'",
        {"run/run.yaml": "{"},
    ),
    Case(
        "a run.yaml with an unknown key",
        ["status", "run"],
        "run/run.yaml: unknown key 'a'; expected one of: parent, out, device, precision, processes, deploy, corpus, library, score, cost, search, uptrain, evaluate, places, children",
        {"run/run.yaml": "a: 1\n"},
    ),
    Case(
        "a run.yaml with a child outside",
        ["status", "run"],
        "run/run.yaml: children: got '../../x'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
        {"run/run.yaml": "children: {../../x: {}}\n"},
    ),
    Case(
        "a child.yaml that is not YAML",
        ["search", "run", "--throughput", "2x"],
        "child run/children/main/child.yaml: not YAML: line 1: expected the node content, but found '<stream end>'",
        {"run/children/main/child.yaml": "["},
    ),
    Case(
        "a child.yaml at a place outside",
        ["assemble", "run"],
        "run/children/main/child.yaml: place: got '../../x'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
        {"run/children/main/child.yaml": "place: ../../x\n"},
    ),
    Case(
        "a place.yaml with an unknown key",
        ["cost", "run"],
        "run/places/here/place.yaml: unknown key 'engine'; expected one of: deploy, cost",
        {"run/places/here/place.yaml": "engine: vllm\n"},
    ),
    Case(
        "a manifest that is damaged",
        ["status", "run"],
        "run/library/manifest.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); expected a Manifest; remove it to make library/ again",
        {"run/library/manifest.json": "{"},
    ),
    Case(
        "a run of another parent",
        ["run", "good.yaml", "--set", "parent=pocket"],
        "run directory run: holds a run of parent 'parent'; choose another --out",
    ),
    Case(
        "an out that is a file",
        ["run", "good.yaml", "--out", "good.yaml"],
        "run directory good.yaml: is a file; choose another --out",
    ),
    Case(
        "an out below a file",
        ["run", "good.yaml", "--out", "good.yaml/run"],
        "run directory good.yaml/run: good.yaml is a file; choose another --out",
    ),
    Case(
        "an out that is too long",
        ["run", "good.yaml", "--out", "x" * 300],
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx: File name too long; choose a shorter name",
    ),
    Case(
        "an out at a user's home that is none",
        ["run", "good.yaml", "--out", "~nobody-here/x"],
        "~nobody-here/x: no user of that name has a home folder here",
    ),
    Case(
        "an out that holds another's files",
        ["run", "good.yaml", "--out", "taken"],
        "run directory taken: holds thesis.tex, which no run of puzzle wrote; choose another --out",
        {"taken/thesis.tex": "years of work"},
    ),
    Case(
        "a question without a run",
        ["search", "--throughput", "2x"],
        "search: give a run directory, or --table FILE with --minimize KEY --max KEY=VALUE",
    ),
    Case(
        "bounds without a table",
        ["search", "run", "--max", "a=3"],
        "search: give a run directory, or --table FILE with --minimize KEY --max KEY=VALUE",
    ),
    Case(
        "a question before there are scores",
        ["search", "run", "--throughput", "2x"],
        "run run: stage score is not done; run `puzzle score run` first",
    ),
    Case(
        "a stage before its turn",
        ["score", "run"],
        "run run: stage library is not done; run `puzzle library run` first",
    ),
    Case(
        "an evaluation before its turn",
        ["evaluate", "run"],
        "run run: stage cost is not done; run `puzzle cost run` first",
    ),
    Case(
        "an export before there is a child",
        ["export", "run", "--to", "gguf"],
        "run run: child main is not made yet; run `puzzle run` first",
    ),
    Case(
        "an export to nothing known",
        ["export", "run", "--to", "onnx"],
        "export: got 'onnx', expected one of: gguf, nemotron-nas",
    ),
    # -------------------------------------------------------------------------- children and places
    Case(
        "a child that is not there",
        ["assemble", "run", "--child", "slow"],
        "run run: no child 'slow'; expected one of main, or make it with `puzzle child run --name slow --throughput 2x`",
    ),
    Case(
        "a child outside of the run",
        ["assemble", "run", "--child", "../../other"],
        "child '../../other': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a child that is the folder above",
        ["remove", "run", "--child", ".."],
        "child '..': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a child that is another folder",
        ["remove", "run", "--child", "../../text"],
        "child '../../text': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
        {"text/child.yaml": "place: here\n"},
    ),
    Case(
        "a child of an absolute path",
        ["remove", "run", "--child", "/etc"],
        "child '/etc': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a child with a NUL",
        ["remove", "run", "--child", "a\0b"],
        "child 'a\\x00b': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a child without a name",
        ["remove", "run", "--child", ""],
        "child '': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child outside of the run",
        ["child", "run", "--name", "../x", "--memory", "50%"],
        "child '../x': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child with markup",
        ["child", "run", "--name", "<b>x</b>", "--memory", "50%"],
        "child '<b>x</b>': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child with a blank",
        ["child", "run", "--name", "a b", "--memory", "50%"],
        "child 'a b': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child of 65 letters",
        ["child", "run", "--name", "x" * 65, "--memory", "50%"],
        "child 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child with a hidden name",
        ["child", "run", "--name", ".x", "--memory", "50%"],
        "child '.x': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child with a line end",
        ["child", "run", "--name", "a\n", "--memory", "50%"],
        "child 'a\\n': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child at no place",
        ["child", "run", "--name", "a", "--place", "moon"],
        "run run: no place 'moon'; expected one of here, or make it with `puzzle cost run --place moon`",
    ),
    Case(
        "a new child at a place outside",
        ["child", "run", "--name", "a", "--place", "../x"],
        "child a: place: got '../x'; expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new child's unclear wish",
        ["child", "run", "--name", "a", "--throughput", "fast"],
        "search.throughput: got 'fast'; expected a number with a unit (tok/s, ktok/s) or relative to the parent (2x, 50%)",
    ),
    Case(
        "a new child's two directions",
        [
            "child",
            "run",
            "--name",
            "a",
            "--maximize",
            "throughput",
            "--minimize",
            "memory",
            "--kl",
            "0.1",
        ],
        "child a: search: maximize and minimize are both set; set one of them",
    ),
    Case(
        "a new child's library",
        ["child", "run", "--name", "a", "--set", "library.tokens=1"],
        "--set 'library.tokens=1': 'library' is no setting of a child; expected one of search, uptrain, evaluate, place",
    ),
    Case(
        "two ways to name a child",
        ["child", "run", "--name", "a", "--solution", "0", "--architecture", "good.yaml"],
        "child: give --solution or --architecture, not both",
    ),
    Case(
        "a new place outside of the run",
        ["cost", "run", "--place", "../x"],
        "place '../x': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a new place with markup",
        ["cost", "run", "--place", "<i>"],
        "place '<i>': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a place's engine",
        ["cost", "run", "--engine", "vlm"],
        "--set 'cost.engine=vlm': cost.engine: got 'vlm'; expected 'auto', 'vllm', 'torch' or 'roofline'; did you mean 'vllm'?",
    ),
    Case(
        "a place's unknown key",
        ["cost", "run", "--set", "cost.secnds=3"],
        "--set 'cost.secnds=3': unknown key 'cost.secnds'; did you mean 'seconds'?",
    ),
    Case(
        "a place's search",
        ["cost", "run", "--set", "search.gap=0"],
        "--set 'search.gap=0': 'search' is no setting of a place; expected one of deploy, cost",
    ),
    Case(
        "a question at no place",
        ["search", "run", "--place", "moon", "--throughput", "2x"],
        "run run: no place 'moon'; expected one of here, or make it with `puzzle cost run --place moon`",
    ),
    Case(
        "a question of a child outside",
        ["search", "run", "--child", "../x", "--memory", "50%"],
        "child '../x': expected a name of letters, digits, - and _, with a letter or digit first, of at most 64 characters",
    ),
    Case(
        "a run's child",
        ["library", "run", "--set", "search.throughput=2x"],
        "--set 'search.throughput=2x': 'search' is no setting of the run itself; expected one of corpus, library, score, device, precision",
    ),
    Case(
        "a library of a size it has not",
        ["library", "run", "--set", "library.kv_heads=[3]"],
        "library.kv_heads: got 3, but the parent has 2 KV heads; expected divisors of it: [2, 1]",
    ),
    Case(
        "a stage's wrong figure",
        ["score", "run", "--set", "score.sequences=0"],
        "--set 'score.sequences=0': score.sequences: got 0; expected more than 0",
    ),
    Case(
        "measure a folder that is no child",
        ["measure", "text", "--parent", "parent"],
        "measure text: no config.json; expected the folder of a child",
    ),
    Case(
        "measure at no place",
        ["measure", "parent", "--parent", "parent", "--place", "moon.yaml"],
        "place moon.yaml: no such file; expected a YAML file",
    ),
    Case(
        "measure with a wrong setting",
        ["measure", "parent", "--parent", "parent", "--set", "cost.starts=x"],
        "--set 'cost.starts=x': cost.starts: got 'x'; expected a whole number",
    ),
]
