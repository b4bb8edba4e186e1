import hashlib
import json
import os
import re

import pytest

from puzzle import artifacts
from puzzle.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), artifacts.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert artifacts.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Count(artifacts.Record):
    n: int


@pytest.mark.parametrize("torn", [b'{"n": 3', b'{"n": 3}', b"{"])
def test_a_torn_last_line_is_cut_off_and_appending_goes_on(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    artifacts.append_record(path, Count(n=1))
    artifacts.append_record(path, Count(n=2))
    with path.open("ab") as file:
        file.write(torn)
    assert artifacts.read_records(path, Count) == [Count(n=1), Count(n=2)]
    artifacts.append_record(path, Count(n=3))
    assert artifacts.read_records(path, Count) == [Count(n=1), Count(n=2), Count(n=3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"n": "many"}', r"a.jsonl, line 2: n: got 'many'; .*; expected a Count"),
        ('{"n": 1, "m": 2}', r"a.jsonl, line 2: m: got 2; .*; expected a Count"),
        ("{", r"a.jsonl, line 2: not JSON .*; expected a Count"),
    ],
)
def test_a_damaged_record_is_one_clear_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n')
    with pytest.raises(UserError, match=message) as error:
        artifacts.read_records(path, Count)
    assert "\n" not in str(error.value)


def test_a_manifest_names_every_file_but_the_checkpoints_with_its_checksum(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "work").write_text("x")
    (tmp_path / artifacts.UNFINISHED).mkdir()
    (tmp_path / artifacts.UNFINISHED / "last").write_text("y")
    manifest = artifacts.write_manifest(tmp_path, {"a": 1}, seconds=1.0)
    digest = hashlib.sha256(b"x").hexdigest()
    assert digest.startswith(manifest.files["sub/work"])
    assert not any("last" in name for name in manifest.files)
    assert not (tmp_path / artifacts.UNFINISHED).exists()
    assert artifacts.read_manifest(tmp_path) == manifest
    (tmp_path / "sub" / "work").write_text("z")
    assert artifacts.write_manifest(tmp_path, {"a": 1}, 1.0).fingerprint != manifest.fingerprint


def test_a_stage_is_done_only_for_the_inputs_it_was_done_for(tmp_path):
    assert not artifacts.is_done(tmp_path, {"a": [1, 2]})
    artifacts.write_manifest(tmp_path, {"a": [1, 2]}, seconds=1.0)
    assert artifacts.is_done(tmp_path, {"a": [1, 2]})
    assert not artifacts.is_done(tmp_path, {"a": [1, 3]})


def test_beginning_with_the_same_inputs_keeps_the_work_and_with_others_removes_it(tmp_path):
    folder = tmp_path / "stage"
    artifacts.begin(folder, {"a": 1})
    (folder / "sub").mkdir()
    (folder / "sub" / "work").write_text("x")
    artifacts.begin(folder, {"a": 1})
    assert (folder / "sub" / "work").exists()
    artifacts.begin(folder, {"a": 2})
    assert not (folder / "sub").exists()


def test_the_fingerprint_does_not_depend_on_key_order():
    assert artifacts.fingerprint({"a": 1, "b": 2}) == artifacts.fingerprint(
        json.loads('{"b": 2, "a": 1}')
    )


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another run directory"):
        artifacts.begin(tmp_path / "library", {"a": 1})
    assert (tmp_path / "library" / "thesis.tex").read_text() == "years of work"


def test_a_folder_opened_an_instant_before_a_kill_is_opened_again(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / ".started.json.part").write_text('{"a"')
    artifacts.begin(tmp_path / "library", {"a": 1})
    assert artifacts.read_json(tmp_path / "library" / artifacts.STARTED) == {"a": 1}


def test_damage_names_the_file_that_is_not_as_it_was_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    manifest = artifacts.write_manifest(tmp_path, {}, 1.0)
    assert artifacts.damage(tmp_path, manifest) is None and artifacts.is_done(tmp_path, {})
    flipped = bytearray(range(256))
    flipped[200] ^= 1
    (tmp_path / "b").write_bytes(flipped)
    assert re.match(rf"{tmp_path}/b is damaged", artifacts.damage(tmp_path, manifest))
    assert not artifacts.is_done(tmp_path, {})
    (tmp_path / "a").unlink()
    assert artifacts.damage(tmp_path, manifest) == f"{tmp_path}/a is missing"


def test_a_damaged_manifest_is_one_line_that_says_how_to_mend_it(tmp_path):
    folder = tmp_path / "score"
    (folder / "sub").mkdir(parents=True)
    artifacts.write_manifest(folder, {"tokens": 1000}, 1.0)
    path = folder / artifacts.MANIFEST
    text = path.read_text()
    for damaged in (text.replace("1000", "1001"), text[:-20]):  # one is JSON, one is not
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"manifest.json.*remove it to make score/ again$"):
            artifacts.read_manifest(folder)


def test_checksums_read_a_file_again_only_when_its_size_or_time_has_changed(tmp_path, monkeypatch):
    path, store, reads = tmp_path / "weights", tmp_path / "checksums.jsonl", []
    real = artifacts.file_fingerprint
    monkeypatch.setattr(
        artifacts, "file_fingerprint", lambda path: (reads.append(path), real(path))[1]
    )
    path.write_bytes(b"1")
    first = artifacts.Checksums(store).of(path)
    assert artifacts.Checksums(store).of(path) == first and len(reads) == 1
    os.utime(path, ns=(1, 1))
    assert artifacts.Checksums(store).of(path) == first and len(reads) == 2
    path.write_bytes(b"22")
    os.utime(path, ns=(1, 1))
    assert artifacts.Checksums(store).of(path) != first and len(reads) == 3
    store.write_text("rubbish\n")
    assert artifacts.Checksums(store).of(path) == real(path)
    assert len(store.read_text().splitlines()) == 1


def test_what_an_interrupted_write_has_left_is_in_no_manifest(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / ".manifest.json.part").write_text("{")
    manifest = artifacts.write_manifest(tmp_path, {}, 1.0)
    assert list(manifest.files) == ["a"] and artifacts.damage(tmp_path, manifest) is None
