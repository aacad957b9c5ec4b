import pytest

from lightning_lab.data.datamodule import split_sizes
from lightning_lab.errors import LabError


def test_counts_and_fractions() -> None:
    assert split_sizes([12_000, 1_500, 1_500], 15_000, "x") == [12_000, 1_500, 1_500]
    assert split_sizes([0.8, 0.1, 0.1], 503, "x") == [403, 50, 50]
    assert split_sizes([1, 0, 0], 7, "x") == [7, 0, 0]


@pytest.mark.parametrize("split", [[1, 2], [-1, 2, 3], [0, 0, 0], [10, 1.5, 1], [10, 10, 10]])
def test_what_does_not_fit_is_said(split: list[int | float]) -> None:
    with pytest.raises(LabError, match="data.split"):
        split_sizes(split, 20, "x")
