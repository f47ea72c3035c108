"""Predictions beside published measurements: how far off is written down, not tuned away."""

from __future__ import annotations

from tongyun.codesign.validate import published_rows

WIDEST = 4.0
"""No row may be further off than this, either way. docs/validation.md has every ratio."""


def test_predictions_are_in_the_neighbourhood_of_what_was_measured() -> None:
    rows = published_rows()
    assert len(rows) > 20
    for found in rows:
        assert found.low <= found.predicted <= found.high
        assert 1 / WIDEST < found.ratio < WIDEST, found.row


def test_phases_alone_are_close_on_the_chip_without_fitted_figures() -> None:
    alone = [found for found in published_rows() if found.row.phase in ("prefill", "decode")]
    assert {found.row.chip for found in alone} == {"h20"}
    for found in alone:
        assert 0.6 < found.ratio < 1.5, found.row
