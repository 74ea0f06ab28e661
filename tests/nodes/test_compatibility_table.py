"""docs/compatibility.md has the rows that the tests measure. Needs no ComfyUI."""

from __future__ import annotations

import doctest
from pathlib import Path

import compatibility
import features

HERE = Path(__file__).parent


def test_the_table_in_the_docs_has_a_row_for_everything_that_is_tested():
    page = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.rows_of(page) == compatibility.expected_rows()
    assert len(set(compatibility.expected_rows())) == len(compatibility.expected_rows())


def test_every_outcome_of_another_kind_is_shown_by_a_test():
    sources = [path.read_text(encoding="utf-8") for path in HERE.glob("test_node_*.py")]
    for other in features.OTHERS:
        assert any(f"def {other.test}(" in source for source in sources), other.test


def test_a_table_is_read_back_as_it_was_written():
    errors = {"rows": 0.0, "all": 3.1e-7}
    measured = [row for row in compatibility.expected_rows() if row[1]]
    hosts = [
        compatibility.Measured("0.10.0", dict.fromkeys(measured, errors)),
        compatibility.Measured("0.9.1", dict.fromkeys(measured, {"rows": 2e-8, "all": 1e-7})),
    ]
    text = compatibility.table(hosts)
    assert "ComfyUI 0.9.1 and 0.10.0" in text
    assert "| LoRA | full | within 2e-08; folded within 4e-07 |" in text  # the worse of the two
    marked = f"{compatibility.BEGIN}\n{text}\n{compatibility.END}"
    assert compatibility.rows_of(marked) == compatibility.expected_rows()


def test_the_examples_are_right():
    found = doctest.testmod(compatibility)
    assert found.attempted and not found.failed
