import pytest

from puzzle.evaluate import stage as evaluate
from puzzle.report import stage as report

pytestmark = pytest.mark.training


def test_the_page_stands_alone_and_shows_every_row_of_the_table(finished_run):
    html = report.page(finished_run).read_text()
    assert html.count("<svg") == 6
    assert "<script" not in html and 'src="' not in html and "<link" not in html
    for row in evaluate.table(evaluate.read(finished_run)):
        assert all(f"<td>{cell}</td>" in html for cell in row)


def test_modelled_speeds_are_called_modelled(finished_run):
    assert "modelled, not measured" in report.page(finished_run).read_text()
    names = [row[0] for row in evaluate.table(evaluate.read(finished_run))]
    assert not any("measured" in name for name in names)


def test_the_retention_is_the_share_of_the_parents_accuracy(finished_run):
    models = evaluate.read(finished_run)["models"]
    if models["parent"]["top1"]:
        expected = models["uptrained"]["top1"] / models["parent"]["top1"]
        assert models["uptrained"]["retention"] == pytest.approx(expected)
    assert models["parent"]["kv_cache_bytes_per_token"] == 4 * 2 * 2 * 16 * 4
