"""Real architectures, from the table in `model_zoo`: every field of every parameter, in one backward, against one
backward per example.
"""

import pytest
import torch
from model_zoo import ROWS, assert_exact, float64_throughout, measure, mixing, parameters
from torch import Tensor

from perexample import PerExampleError, RecordedModel, extend, perex
from perexample.extensions import BatchL2Grad, ClippedGrad

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


RECORDED = (
    "bert-sdpa", "bert-mlm-tied", "deberta-v2", "gpt2-tied", "llama-sdpa", "gemma3", "mamba", "t5-lm-tied", "bart",
    "vit", "convnext", "whisper",
)  # fmt: skip


@pytest.mark.parametrize("row", [row for row in EXACT if row.id in RECORDED], ids=lambda row: row.id)
def test_as_recorded_models(row):
    """The same as the model itself, with all examples and with fewer."""
    model, inputs = row.model(), row.inputs(row.n)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "use_cache"):
            module.config.use_cache = False
    extend(model)
    own, other = (ClippedGrad(0.1), BatchL2Grad()), (ClippedGrad(0.1), BatchL2Grad())
    recorded = RecordedModel(model, extensions=own, **inputs)
    named = [p for p in model.parameters() if p.requires_grad]
    for n in (row.n, row.n - 1):
        batch = {key: t[:n] if isinstance(t, Tensor) else t for key, t in inputs.items()}
        found = []
        for call, extensions in ((recorded, own), (model, other)):
            with perex(*extensions, grad=False):
                row.loss(call(**batch)).backward()
            found.append([getattr(p, extension.field).clone() for extension in extensions for p in named])
            extensions[0].zero_grad()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
