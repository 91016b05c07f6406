"""How complex targets are for a student: its empirical neural tangent kernel, and what it says of targets.

Harutyunyan et al. (ICLR 2023, arXiv 2301.12245) explain by this measure why some teachers suit a student better.

```python
ntk = empirical_ntk(student, inputs, kind="trace")  # held-out examples, without labels
labels, teacher = torch.nn.functional.one_hot(labels, 10) - 0.1, teacher_probabilities - 0.1
supervision_complexity(ntk, labels).value >= supervision_complexity(ntk, teacher).value  # a teacher that helps
```
"""

from hf_curriculum_distill.complexity.kernel import (
    KINDS,
    empirical_ntk,
    hidden_states,
    logit_contrasts,
    logits,
    sketched_ntk,
)
from hf_curriculum_distill.complexity.supervision import SupervisionComplexity, margin_bound, supervision_complexity

__all__ = [
    "KINDS",
    "SupervisionComplexity",
    "empirical_ntk",
    "hidden_states",
    "logit_contrasts",
    "logits",
    "margin_bound",
    "sketched_ntk",
    "supervision_complexity",
]
