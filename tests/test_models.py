"""Real architectures, from the table in `model_zoo`: every field of every parameter, in one backward, against one
backward per example.
"""

import pytest
from model_zoo import ROWS, assert_exact, float64_throughout, measure, mixing, parameters

from perexample import PerExampleError

pytest.importorskip("transformers", reason="the models are those of transformers, which is not installed")

# An error in its place would make the library take another way than it takes for its users.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
EXACT = [row for row in ROWS if not row.refused]
REFUSED = [row for row in ROWS if row.refused]


@pytest.fixture(autouse=True)
def _float64():
    with float64_throughout():
        yield


@pytest.mark.parametrize("row", parameters(EXACT))
def test_reference(row):
    """Without the library: the batch's gradient is the mean of the examples', so the row is fit for a test."""
    error, name = mixing(row)
    assert error <= 1e-10, f"{row.id}: at {name}, the batch's gradient is {error:.1e} away from the examples' mean"


@pytest.mark.parametrize("row", parameters(REFUSED))
def test_refusal_is_warranted(row):
    """Without the library: the batch's gradient is not the mean of the examples'."""
    try:
        error, _ = mixing(row)
    except ValueError as failure:
        assert "more than 1 value per channel" in str(failure)  # noqa: PT017 - other failures are of no interest
    else:
        assert error >= 1e-6


@pytest.mark.parametrize("row", parameters(EXACT))
def test_exact(row):
    try:
        assert_exact(row)
    except PerExampleError as error:
        if not row.either:
            raise
        pytest.xfail(f"refused: {error}")


@pytest.mark.parametrize("row", parameters(REFUSED))
def test_refused(row):
    error, match = row.refused
    with pytest.raises(error, match=match):
        measure(row)


def test_rows_have_names_of_their_own():
    assert len({row.id for row in ROWS}) == len(ROWS)
