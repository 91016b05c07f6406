"""How complex targets are for a student: its empirical neural tangent kernel, and what it says of targets.

Harutyunyan et al. (ICLR 2023, arXiv 2301.12245) explain by this measure why some teachers suit a student better.

```python
ntk = empirical_ntk(student, inputs, "trace")  # held-out examples, without labels: [n, n]
of_labels = supervision_complexity(ntk, class_targets(torch.nn.functional.one_hot(labels, 10))).value
of_teacher = supervision_complexity(ntk, class_targets(teacher_logits.softmax(-1))).value  # less, if it helps
```
"""

from hf_curriculum_distill.complexity.analysis import class_targets, compare_layers, measure_complexity
from hf_curriculum_distill.complexity.kernel import (
    KINDS,
    empirical_ntk,
    hidden_states,
    logit_contrasts,
    logits,
    sketched_ntk,
)
from hf_curriculum_distill.complexity.supervision import (
    SupervisionComplexity,
    margin_bound,
    relative_complexity,
    supervision_complexity,
)

__all__ = [
    "KINDS",
    "SupervisionComplexity",
    "class_targets",
    "compare_layers",
    "empirical_ntk",
    "hidden_states",
    "logit_contrasts",
    "logits",
    "margin_bound",
    "measure_complexity",
    "relative_complexity",
    "sketched_ntk",
    "supervision_complexity",
]
