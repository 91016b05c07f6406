"""A page that says how faithful a student is to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_curriculum_distill.report.fidelity import Example, Fidelity, reliability
from hf_curriculum_distill.report.figures import inline_svg
from hf_curriculum_distill.report.page import figure, heading, legend, make_page, panels, paragraph, table

METRICS = {
    "eval_agreement": "agreement: share of predictions that are the teacher's, too",
    "eval_kl": "KL divergence from the teacher (nats)",
    "eval_accuracy": "accuracy of the student",
    "eval_teacher_accuracy": "accuracy of the teacher",
    "eval_loss": "loss of the student's own task",
    "eval_ece": "expected calibration error of the student",
    "eval_teacher_ece": "expected calibration error of the teacher",
}
_MODELS = ("student", "teacher")
_SPACES = ("\u2581", "\u0120")  # before a token that begins a word, in SentencePiece and byte-level BPE
_STUDENT, _TEACHER = ("-", "#0072b2"), ("--", "#d55e00")
_STYLE = """\
.example { display: grid; column-gap: 2rem; margin: 1rem 0 1.75rem }
.example h3 { font-size: .95rem; margin: 0; font-weight: 600; grid-column: 1 / -1 } .example .table { margin: 0 }
@media (min-width: 60rem) { .example { grid-template-columns: minmax(0, 1fr) auto } }
.text { line-height: 1.9; overflow-wrap: anywhere; margin: .25rem 0 }
mark { color: inherit; padding: .1rem .15rem; border-radius: .2rem; border-bottom: 2px solid var(--vermilion);
  background: color-mix(in srgb, var(--vermilion) var(--share), transparent) }
"""


def fidelity_page(
    fidelity: Fidelity, title: str, note: str, tokenizer: PreTrainedTokenizerBase | None, classes: dict[int, str]
) -> bytes:
    """The page, which holds all that it shows; figures need matplotlib.

    Args:
        fidelity: what [`measure_fidelity`] found.
        title, note: what was compared, and on what.
        tokenizer: of the student, for examples that are text.
        classes: names of the classes, where these are no tokens.
    """
    rows = [[text, f"{fidelity.metrics[name]:.4f}"] for name, text in METRICS.items() if name in fidelity.metrics]
    parts = [table([["measure", "value"], *rows])]
    parts.append(paragraph(f"Means over {len(fidelity.rows['kl']):,} predictions."))
    if fidelity.pairs:
        rows = [[f"{s} ← {t}", f"{fidelity.metrics[f'eval_layer_{s}_mse']:.4f}"] for s, t in fidelity.pairs]
        parts += [heading("Distance of the layers"), table([["student ← teacher layer", "mean squared error"], *rows])]
        parts.append(paragraph("To the projected hidden states of the teacher; 1 is as far as their mean."))
    if find_spec("matplotlib"):
        parts += [heading("Where confidence is right, and where the two differ"), *_figures(fidelity)]
    if fidelity.examples:
        parts.append(heading("Examples on which they differ most"))
        parts.append(
            paragraph(
                "By mean KL divergence. A mark is what was to be predicted, stronger the more the two differ there; a "
                "table has the five predictions of the largest divergence, with their probabilities."
            )
        )
        parts += [_show_example(example, tokenizer, classes) for example in fidelity.examples]
    return make_page(title, note, parts, _STYLE)


def _figures(fidelity: Fidelity) -> list[str]:
    from matplotlib.figure import Figure

    rows, drawings = fidelity.rows, []
    labelled = rows["label"] >= 0
    if labelled.any():
        drawn = Figure(figsize=(5, 3.6), layout="constrained")
        axis = drawn.subplots()
        axis.plot([0, 1], [0, 1], color="0.5", linestyle=(0, (1, 2)), linewidth=1)
        for who, (style, color) in {"student": _STUDENT, "teacher": _TEACHER}.items():
            right = rows[who][labelled] == rows["label"][labelled]
            shares, means, accuracies = reliability(rows[f"{who}_confidence"][labelled], right)
            axis.plot(means, accuracies, style, color=color)
            axis.scatter(means, accuracies, 8 + 120 * shares, color, zorder=3)
        axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        label = "Accuracy of predictions by their confidence; dotted: where the two are equal; larger dots are more."
        drawings.append((drawn, label))
    drawn = Figure(figsize=(5, 3.6), layout="constrained")
    axis = drawn.subplots()
    bins = np.minimum((rows["teacher_confidence"] * 10).astype(int), 9)
    means = [rows["kl"][bins == each].mean() if (bins == each).any() else 0.0 for each in range(10)]
    axis.bar((np.arange(10) + 0.5) / 10, means, 0.085, color="#009e73")
    axis.set(xlabel="confidence of the teacher", ylabel="KL from the teacher (nats)", xlim=(0, 1))
    drawings.append((drawn, "Mean divergence by the teacher's confidence."))
    for each, _ in drawings:
        each.axes[0].spines[["top", "right"]].set_visible(False)
        each.axes[0].grid(color="0.5", alpha=0.2)
        each.axes[0].set_axisbelow(True)
    key = [legend([("student", *_STUDENT), ("teacher", *_TEACHER)])] if labelled.any() else []
    return [*key, panels([figure(inline_svg(each), label, label) for each, label in drawings])]


def _show_example(example: Example, tokenizer: PreTrainedTokenizerBase | None, classes: dict[int, str]) -> str:
    name = _namer(tokenizer, classes)
    title = f"<h3>Example {example.number:,}, KL {example.kl:.3f}</h3>"
    text = ""
    if example.inputs is not None and tokenizer is not None:
        text = f'<p class="text">{"".join(_mark_tokens(example, tokenizer, name))}</p>'
    rows = example.rows
    order = np.argsort(-rows["kl"], kind="stable")[:5]
    lines = [["label", "student", "teacher", "KL"]]
    for row in order:
        label = "-" if rows["label"][row] < 0 else name(rows["label"][row])
        predicted = [f"{name(rows[who][row])} ({rows[f'{who}_confidence'][row]:.2f})" for who in _MODELS]
        lines.append([label, *predicted, f"{rows['kl'][row]:.3f}"])
    return f'<div class="example">{title}{text}{table(lines)}</div>'


def _namer(tokenizer: PreTrainedTokenizerBase | None, classes: dict[int, str]) -> Callable[[Any], str]:
    def name(number: Any) -> str:
        if classes:
            return classes.get(int(number), str(number))
        if tokenizer is None:
            return str(number)
        # without the marks of a vocabulary for a word's beginning
        return tokenizer.decode([int(number)]).strip() or repr(tokenizer.decode([int(number)]))

    return name


def _mark_tokens(example: Example, tokenizer: PreTrainedTokenizerBase, name: Callable[[Any], str]) -> Sequence[str]:
    """The text of an example as HTML: a mark for each token that is predicted, which says more under the pointer."""
    values, most = example.rows, max(float(example.rows["kl"].max()), 1e-9)
    rows = {int(position): row for row, position in enumerate(values["position"]) if position >= 0}
    numbers = example.inputs.tolist()
    for position, row in rows.items():  # what is right, in place of a mask
        numbers[position] = numbers[position] if values["label"][row] < 0 else int(values["label"][row])
    tokens, pieces = tokenizer.convert_ids_to_tokens(numbers), []
    marks_spaces = any(token[:1] in _SPACES for token in tokens)
    for position, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
        begins = token[:1] in _SPACES if marks_spaces else not token.startswith("##")
        shown = escape(tokenizer.decode([number]).strip().removeprefix("##")) or "\N{RETURN SYMBOL}"
        if position in rows:
            row = rows[position]
            said = [f"{who}: {name(values[who][row])} ({values[f'{who}_confidence'][row]:.2f})" for who in _MODELS]
            title = escape(", ".join([*said, f"KL {values['kl'][row]:.3f}"]))
            share = f"{60 * float(values['kl'][row]) / most:.0f}%"
            shown = f'<mark style="--share: {share}" title="{title}">{shown}</mark>'
        pieces.append((" " if begins else "") + shown)
    return pieces
