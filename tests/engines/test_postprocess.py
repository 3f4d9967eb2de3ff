"""What an engine's outputs mean, from io.json alone."""

import numpy as np
import pytest

from edgekd.engines.postprocess import postprocess
from edgekd.errors import DataError
from edgekd.tasks import Classification

ABOUT = Classification().postprocessing(["cat", "dog", "bird"])
LOGITS = np.array([[0.0, np.log(3.0), -np.inf], [1000.0, 0.0, 0.0]], np.float32)


def test_classes_by_hand():
    found = postprocess({"logits": LOGITS}, ABOUT)
    assert found.names == ("dog", "cat")
    assert found.indices.tolist() == [1, 0]
    np.testing.assert_allclose(found.scores, [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], atol=1e-6)


def test_the_task_decides_alike():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    other = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    one, two = (postprocess({"logits": each}, ABOUT) for each in (logits, other))
    np.testing.assert_array_equal(one.indices, logits.argmax(1))
    assert one.changed(two) / 50 == Classification().changed(logits, other) > 0


@pytest.mark.parametrize(
    ("outputs", "about", "message"),
    [
        ({"logits": LOGITS}, None, "does not say what the outputs mean"),
        (
            {"logits": LOGITS},
            {"kind": "tracking"},
            "this edgekd knows classification, detection, segmentation, saliency",
        ),
        ({"boxes": LOGITS}, ABOUT, "expected an output 'logits'; the engine gave boxes"),
        ({"logits": LOGITS[:, :2]}, ABOUT, r"has shape \[2, 2\]; expected \[N, 3 classes\]"),
    ],
)
def test_what_is_refused(outputs, about, message):
    with pytest.raises(DataError, match=message):
        postprocess(outputs, about)
