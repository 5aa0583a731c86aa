"""What trials can report follows from labels and from what is known of the teacher."""

from jobs.trainings import measurable

CLASSES = {"validation/accuracy": 0.8, "validation/nll": 0.6, "validation/agreement": 1.0, "validation/kl_to_teacher": 0.0}
ALIKE = {"validation/agreement": 1.0, "validation/kl_to_teacher": 0.0}


def test_what_can_be_measured():
    assert measurable("text_classification", CLASSES, labelled=True, live=False) == [*CLASSES, "validation/retention"]
    assert measurable("text_classification", ALIKE, labelled=False, live=False) == list(ALIKE)
    assert measurable("text_classification", {}, labelled=True, live=False) == ["validation/accuracy", "validation/nll"]  # draws
    assert measurable("text_classification", {}, labelled=True, live=True) == list(CLASSES)
    assert measurable("embedding", {"validation/cosine": 1.0, "validation/mse_to_teacher": 0.0}, labelled=False, live=False) == [
        "validation/cosine", "validation/mse_to_teacher", "validation/retention",
    ]  # fmt: skip
    worse = {"validation/pearson": -0.1, "validation/mse": 1.0, "validation/mae": 1.0, "validation/mse_to_teacher": 0.0}
    assert measurable("regression", worse, labelled=True, live=False) == list(worse)
