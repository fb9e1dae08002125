"""WEAKCLIP_TEST_REQUIRE: tests that must not be skipped."""

from __future__ import annotations

import pytest

from tests.conftest import beside_the_repository, required


@pytest.mark.parametrize(
    "names, outcome",
    [("", pytest.skip.Exception), ("slurm,coco", pytest.skip.Exception), ("slurm,golden", pytest.fail.Exception)],
)
def test_what_is_missing_skips_a_test_and_fails_one_where_it_is_required(monkeypatch, names, outcome):
    monkeypatch.setenv("WEAKCLIP_TEST_REQUIRE", names)
    with pytest.raises(outcome, match="no shared/nowhere beside the repository"):
        beside_the_repository("shared/nowhere", "golden")


def test_an_unknown_name_in_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("WEAKCLIP_TEST_REQUIRE", "slurm,gloden")
    with pytest.raises(pytest.UsageError, match="unknown gloden; known: slurm, golden, coco"):
        required()
