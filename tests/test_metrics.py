"""Metrics against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill.metrics import CountedAccuracy


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-100, 0, 1, 2, 3])), min_size=1, max_size=30))
def test_counted_accuracy_is_the_share_of_right_predictions_that_count(pairs):
    counted = [(prediction, reference) for prediction, reference in pairs if reference != -100]
    predictions, references = zip(*pairs, strict=True)
    if counted:
        result = CountedAccuracy().compute(predictions=list(predictions), references=np.array(references))
        assert result == {"accuracy": pytest.approx(sum(p == r for p, r in counted) / len(counted))}
    else:
        with pytest.raises(ValueError, match="No reference counts"):
            CountedAccuracy().compute(predictions=list(predictions), references=list(references))
