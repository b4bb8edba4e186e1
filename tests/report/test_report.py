import pytest

from puzzle.evaluate import results as evaluation
from puzzle.report.stage import page
from puzzle.report.table import rows

pytestmark = pytest.mark.training


@pytest.fixture
def job(finished_run):
    return finished_run.child_job("main")


def test_the_page_stands_alone_and_shows_every_row_of_the_table(job):
    html = page(job).read_text()
    assert html.count("<svg") == 6
    assert "<script" not in html and 'src="' not in html and "<link" not in html
    for row in rows(evaluation.read(job)):
        assert all(f"<td>{cell}</td>" in html for cell in row)


def test_modelled_speeds_are_called_modelled(job):
    assert "modelled, not measured" in page(job).read_text()
    assert not any("measured" in row.name for row in rows(evaluation.read(job)))


def test_the_retention_is_the_share_of_the_parents_accuracy(job):
    results = evaluation.read(job)
    top1 = results.parent.quality.top1.value
    if top1:
        kept, expected = results.uptrained.retention, results.uptrained.quality.top1.value / top1
        assert kept.value == pytest.approx(expected) and kept.low <= kept.value <= kept.high
    assert results.parent.kv_cache_bytes_per_token == 4 * 2 * 2 * 16 * 4
