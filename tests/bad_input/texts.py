"""Corpora and questions."""

import json

from case import Case

ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(10))
GOOD_QUESTION = '{"context": "a", "choices": ["b", "c"], "answer": 0}\n'


def corpus(
    name: str, path: str, message: str, content: str | bytes | None = None, **source: object
) -> Case:
    """A run whose only source is `path`."""
    sources = json.dumps([{"path": path, **source}])
    files = {} if content is None else {path: content}
    return Case(name, ["run", "good.yaml", "--set", f"corpus.sources={sources}"], message, files)


def task(name: str, value: str, message: str, content: str | bytes | None = None) -> Case:
    """A run with a task for its scores."""
    files = {} if content is None else {value: content}
    arguments = ["run", "good.yaml", "--set", f"score.task={value}"]
    return Case(name, arguments, message, files)


CASES = [
    corpus(
        "corpus: nowhere",
        "nowhere",
        "corpus source nowhere: no such file or folder; a dataset of the hub is written {dataset: NAME}",
    ),
    corpus(
        "corpus: nowhere at home",
        "~/nowhere",
        "corpus source …/nowhere: no such file or folder; a dataset of the hub is written {dataset: NAME}",
    ),
    Case(
        "corpus: a folder without text",
        ["run", "good.yaml", "--set", "corpus.sources=[empty]"],
        "corpus source empty: no readable file; expected any of .c .cpp .go .h .html .java .js .jsonl .md .parquet .py .rs .rst .tex .ts .txt",
        {"empty/a.png": b"x"},
    ),
    corpus(
        "corpus: an empty file",
        "a.txt",
        "corpus source a.txt: holds no text; expected UTF-8 text, JSON Lines or Parquet",
        "",
    ),
    corpus(
        "corpus: blank lines",
        "a.txt",
        "corpus source a.txt: holds no text; expected UTF-8 text, JSON Lines or Parquet",
        "\n \n\n",
    ),
    corpus(
        "corpus: a binary file",
        "a.txt",
        "corpus source a.txt: not UTF-8 text; expected text, or a file that ends in .jsonl or .parquet",
        b"\x80\xff\x00" * 100,
    ),
    corpus(
        "corpus: a binary file of an unknown kind",
        "a.bin",
        "corpus source a.bin: not UTF-8 text; expected text, or a file that ends in .jsonl or .parquet",
        b"\x80\xff\x00" * 100,
    ),
    corpus(
        "corpus: rows that are not JSON",
        "a.jsonl",
        "a.jsonl, line 11: not JSON (Expecting property name enclosed in double quotes); expected one object a line",
        ROWS + "{broken\n",
    ),
    corpus(
        "corpus: a row that is a list",
        "a.jsonl",
        "a.jsonl, line 11: got list, expected a JSON object",
        ROWS + "[1]\n",
    ),
    corpus(
        "corpus: a row that is a number",
        "a.jsonl",
        "a.jsonl, line 1: got int, expected a JSON object",
        "3\n",
    ),
    corpus(
        "corpus: rows that are not UTF-8",
        "a.jsonl",
        "a.jsonl, line 11: not JSON ('utf-8' codec can't decode byte 0xff in position 10: invalid start byte); expected one object a line",
        ROWS.encode() + b'{"text": "\xff"}\n',
    ),
    corpus(
        "corpus: rows nested deep",
        "a.jsonl",
        "a.jsonl, line 1: not JSON (nested too deeply); expected one object a line",
        "[" * 100_000 + "\n",
    ),
    corpus(
        "corpus: rows with an endless number",
        "a.jsonl",
        "a.jsonl, line 1: not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit); expected one object a line",
        '{"text": ' + "9" * 5000 + "}\n",
    ),
    corpus(
        "corpus: rows without the column",
        "a.jsonl",
        "corpus source a.jsonl, row 1: no 'text' and no 'messages'; got columns 'body'; set text_column or messages_column",
        '{"body": "x"}\n',
    ),
    corpus(
        "corpus: rows without the column asked for",
        "a.jsonl",
        "corpus source a.jsonl, row 1: no 'body' and no 'messages'; got columns 'text'; set text_column or messages_column",
        ROWS,
        text_column="body",
    ),
    corpus(
        "corpus: a column of numbers",
        "a.jsonl",
        "corpus source a.jsonl, row 1: 'text' is int, expected text; set text_column to another column",
        '{"text": 3}\n',
    ),
    corpus(
        "corpus: rows of nothing",
        "a.jsonl",
        "corpus source a.jsonl: holds no text; expected UTF-8 text, JSON Lines or Parquet",
        "\n\n",
    ),
    corpus(
        "corpus: no Parquet",
        "a.parquet",
        "a.parquet: not a readable Parquet file (Parquet file size is 1 bytes, smaller than the minimum file footer (8 bytes))",
        "x",
    ),
    Case(
        "corpus: too short",
        ["run", "good.yaml", "--set", "corpus.sources=[short.txt]"],
        "corpus (short.txt): the score side holds less than one sequence of 32 tokens; add text, lower corpus.sequence_length or change corpus.held_out_fraction",
        {"short.txt": "two words\n"},
        stays=False,
    ),
    Case(
        "corpus: nothing held out",
        ["run", "good.yaml", "--set", "corpus.held_out_fraction=0.0001"],
        "corpus (text): the score side holds less than one sequence of 32 tokens; add text, lower corpus.sequence_length or change corpus.held_out_fraction",
        stays=False,
    ),
    Case(
        "corpus: rows broken far down",
        ["run", "good.yaml", "--set", "corpus.sources=[a.jsonl]"],
        "a.jsonl, line 201: not JSON (Expecting property name enclosed in double quotes); expected one object a line",
        {"a.jsonl": ROWS * 20 + "{broken\n"},
        stays=False,
    ),
    corpus(
        "corpus: a dataset's name for a path",
        "org/dataset",
        "corpus source org/dataset: no such file or folder; a dataset of the hub is written {dataset: NAME}",
    ),
    task(
        "task: no such file",
        "questions.jsonl",
        "score.task questions.jsonl: no such file; expected held-out, a JSON Lines file, or a task of lm-eval",
    ),
    task(
        "task: a folder",
        "text",
        "score.task text: is a folder; expected held-out, a JSON Lines file, or a task of lm-eval",
    ),
    task(
        "task: empty",
        "q.jsonl",
        "score.task q.jsonl: got less than two questions; expected some that score blocks and others that are reported",
        "",
    ),
    task(
        "task: one question",
        "q.jsonl",
        "score.task q.jsonl: got less than two questions; expected some that score blocks and others that are reported",
        GOOD_QUESTION,
    ),
    task(
        "task: not JSON",
        "q.jsonl",
        'score.task q.jsonl: line 2 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        GOOD_QUESTION + "{",
    ),
    task(
        "task: binary",
        "q.jsonl",
        'score.task q.jsonl: not UTF-8 text; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        b"\x80\xff",
    ),
    task(
        "task: a list",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        "[1, 2]\n",
    ),
    task(
        "task: no choices",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        '{"context": "a", "answer": 0}\n',
    ),
    task(
        "task: one choice",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        '{"context": "a", "choices": ["b"], "answer": 0}\n',
    ),
    task(
        "task: an answer outside",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        '{"context": "a", "choices": ["b", "c"], "answer": 2}\n',
    ),
    task(
        "task: an answer that is true",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        '{"context": "a", "choices": ["b", "c"], "answer": true}\n',
    ),
    task(
        "task: choices that are a text",
        "q.jsonl",
        'score.task q.jsonl: line 1 is not a question; expected {"context": text, "choices": [text, text, ...], "answer": index}',
        '{"context": "a", "choices": "bc", "answer": 0}\n',
    ),
]
