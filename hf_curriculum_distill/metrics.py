"""Metrics of the `evaluate` library that need no download."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class CountedAccuracy(evaluate.Metric):
    """Share of predictions equal to their reference, over references that are not -100.

    `compute` takes `predictions` and `references`, flat class numbers, and raises a `ValueError` if all references are
    -100.

    ```python
    >>> CountedAccuracy().compute(predictions=[1, 2, 3], references=[1, 0, -100])
    {'accuracy': 0.5}

    ```
    """

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over references that are not -100.",
            citation="",
            inputs_description="predictions and references: class numbers, flat; -100 is not counted.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        counted = references != -100
        if not counted.any():
            raise ValueError("No reference counts: all are -100. Check the labels.")
        return {"accuracy": float((predictions == references)[counted].mean())}
