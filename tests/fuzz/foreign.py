"""Strategies for strangers' bytes: anything at all, and good files with something wrong."""

import copy
import json

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1e308, -0.0]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "..", "../../etc/x", "/etc/passwd", "a/b", "<b>", "[red]", "~", "\0"]),
    st.sampled_from(["layer_99999999", "layer_" + "9" * 5000, "gqa_" + "9" * 5000 + "+no_op"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@st.composite
def mutated(draw, document):
    """A JSON document with up to three of its values replaced, dropped, doubled or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        container, key = _place(draw, document)
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"])):
            case "replace" if key is not None:
                container[key] = draw(VALUES)
            case "drop" if key is not None:
                del container[key]
            case _:
                if isinstance(container, list):
                    container.append(draw(VALUES))
                else:
                    container[draw(TEXTS)] = draw(VALUES)
    return document


def _place(draw, container):
    """A list or mapping somewhere in a document, and one of its keys; None where it is empty."""
    while True:
        keys = range(len(container)) if isinstance(container, list) else sorted(container)
        if not keys:
            return container, None
        key = draw(st.sampled_from(keys))
        inner = container[key]
        if not isinstance(inner, list | dict) or draw(st.booleans()):
            return container, key
        container = inner


@st.composite
def damaged(draw, data: bytes):
    """Bytes that are cut, changed, repeated, or followed by others."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 64)))
        match draw(st.sampled_from(["cut", "change", "insert", "end"])):
            case "cut":
                del data[start:end]
            case "change":
                data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
            case "insert":
                data[start:start] = draw(st.binary(max_size=16))
            case "end":
                del data[start:]
    return bytes(data)


def files(document):
    """A file that should hold this JSON document: mutated, damaged, or any bytes at all."""
    text = json.dumps(document).encode()
    return st.one_of(
        mutated(document).map(lambda value: json.dumps(value).encode()),
        damaged(text),
        st.binary(max_size=200),
        st.sampled_from([text.replace(b"2", b"9" * 5000), b"[" * 50_000, b"\xef\xbb\xbf" + text]),
        VALUES.map(lambda value: json.dumps(value).encode()),
    )
