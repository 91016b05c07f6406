"""The model card of a student, made from facts about its run: metadata and text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_curriculum_distill.report.figures import PLOT_FILE

_METHODS = {
    "curriculum": "It first learns hidden states of the teacher through a fixed projection, and then the teacher's "
    "logits, as the stages below say. The teacher is fully trained and stays as it is.",
    "one_shot": "It learns the logits of the teacher from the first step to the last. The teacher is fully trained and "
    "stays as it is.",
    "progressive": "It learns the logits of checkpoints of the teacher's own training, one after another. Each "
    "checkpoint teaches until the student has come to the step of the next one.",
    "online": "It learns the logits of a teacher that trains alongside it. Both see the same batches.",
    "hidden": "It learns hidden states of the teacher through a fixed projection. The teacher stays as it is, and its "
    "head, if it has one, teaches nothing.",
    "labels": "It learns the labels of the data alone. A teacher, if there is one, is only what evaluations compare "
    "with.",
    "stages": "It learns, in the stages below, hidden states of the teacher through a fixed projection, the teacher's "
    "logits or the labels. Projections are not trained.",
}
_METRICS = {
    "loss": "loss of the student's own task",
    "accuracy": "accuracy on the labels that count",
    "agreement": "agreement: share of predictions that are the teacher's, too",
    "kl": "KL divergence from the teacher (nats)",
    "cosine": "cosine similarity of embeddings to the teacher's",
}
_UNMEASURED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

_CITATION = """\
@article{gupta2025curriculum,
  title  = {Efficient Knowledge Distillation via Curriculum Extraction},
  author = {Gupta, Shivam and Karmalkar, Sushrut},
  year   = {2025}, eprint = {2503.17494}, archivePrefix = {arXiv},
}"""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Args:
        name: the student's name on the Hub, or of its folder.
        model_class: the name of the student's class.
        record: the content of `curriculum.json`.
        log_history: that of the run's [`~transformers.TrainerState`].
        step: the optimizer step that the weights are of.
        device: what the run trained on, such as "2 x NVIDIA L4".
        tags: further tags.
        task: of the Hub, such as "fill-mask"; None: that of the class.
        train_data, eval_data: what [`describe_dataset`] says of the data.
        is_adapter: whether the weights are a PEFT adapter's.
    """

    name: str
    model_class: str
    record: Mapping[str, Any]
    log_history: Sequence[Mapping[str, Any]]
    step: int
    device: str
    tags: Sequence[str] = ()
    task: str | None = None
    train_data: Mapping[str, Any] | None = None
    eval_data: Mapping[str, Any] | None = None
    is_adapter: bool = False


def describe_dataset(dataset: Any) -> dict[str, Any] | None:
    """Say which data set of the Hub something is: its `id`, `config` and `split`.

    Args:
        dataset: anything; known are data sets that `datasets.load_dataset` has loaded from the Hub.

    Returns:
        None if it is not known to be one data set of the Hub.
    """
    info = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or {}
    ids = {match[1] for source in sources if (match := re.match(r"hf://datasets/([^@]+)@", source))}
    if len(ids) != 1:
        return None
    split = getattr(dataset, "split", None)
    return {"id": ids.pop(), "config": info.config_name, "split": None if split is None else str(split)}


def find_task(model_class: str) -> str | None:
    """The Hub's name for the task of a model class.

    >>> find_task("BertForMaskedLM")
    'fill-mask'
    """
    for task, classes in TASK_MAPPING.items():
        names = (names if isinstance(names, (list, tuple)) else (names,) for names in classes.values())
        if any(model_class in group for group in names):
            return task
    return "feature-extraction" if model_class in MODEL_MAPPING_NAMES.values() else None


def last_evaluation(log_history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The evaluation of the weights that a run has at a step, or else the last one before it.

    Args:
        log_history: of the run. What was evaluated after the training are the weights that it ended with, whatever
            step they are of.
        step: of the weights, which differs from the last step where the best ones were loaded at the end.

    Returns:
        `metric -> value` without the prefix `eval_`, and the evaluation's `step`; empty if there is none.
    """
    ends = [index for index, entry in enumerate(log_history) if "train_runtime" in entry]
    evaluated = [
        (index, entry) for index, entry in enumerate(log_history) if any(name.startswith("eval_") for name in entry)
    ]
    after = [{**entry, "step": step} for index, entry in evaluated if ends and index > ends[-1]]
    entries = after or [entry for _, entry in evaluated if entry.get("step", 0) <= step]
    metrics: dict[str, float] = {}
    for entry in entries:
        if entry.get("step", 0) == entries[-1].get("step", 0):  # several, if there are several data sets
            metrics |= {name.removeprefix("eval_"): v for name, v in entry.items() if name.startswith("eval_")}
    metrics = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value) and not name.endswith(_UNMEASURED)
    }
    return metrics | {"step": entries[-1].get("step", 0)} if metrics else {}


def teachers_on_hub(record: Mapping[str, Any]) -> list[str]:
    """The names on the Hub of a run's teacher, or of its checkpoints; none of a teacher that is not there."""
    teacher = record["teacher"]
    return teacher["name"].split(", ") if teacher and teacher["revision"] else []


def _teaches(record: Mapping[str, Any]) -> bool:
    """Whether the teacher, if there is one, is more than what evaluations compare with."""
    return any(stage["hidden"] or stage["kl_weight"] for stage in record["stages"])


# ---- metadata ----


def make_metadata(facts: CardFacts) -> dict[str, Any]:
    """The card's metadata, without what is not known.

    Args:
        facts: see [`CardFacts`].

    Returns:
        plain values, as `huggingface_hub.ModelCardData` takes and returns them.
    """
    teachers = teachers_on_hub(facts.record) if _teaches(facts.record) else []
    method = facts.record["method"].replace("_", "-")
    tags = [*["distillation"] * _teaches(facts.record), method, "generated_from_trainer", *facts.tags]
    metadata: dict[str, Any] = {"library_name": "peft" if facts.is_adapter else "transformers"}
    if teachers and not facts.is_adapter:  # an adapter's base is the model that it is put into
        # The Hub knows "adapter", "merge", "quantized" and "finetune"; a distilled model is counted among the last.
        metadata |= {"base_model": teachers[0] if len(teachers) == 1 else teachers, "base_model_relation": "finetune"}
    if facts.train_data:
        metadata["datasets"] = [facts.train_data["id"]]
    if task := facts.task or find_task(facts.model_class):
        metadata["pipeline_tag"] = task
        if results := _eval_results(facts, task):
            metadata["model-index"] = eval_results_to_model_index(facts.name.split("/")[-1], results)
    return metadata | {"tags": list(dict.fromkeys(tags))}


def _eval_results(facts: CardFacts, task: str) -> list[EvalResult]:
    evaluation, data = last_evaluation(facts.log_history, facts.step), facts.eval_data or {}
    return [
        EvalResult(
            task_type=task,
            dataset_type=data.get("id", "unknown"),
            dataset_name=data.get("id", "unknown"),
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            metric_type=name,
            metric_name=_describe_metric(name),
            metric_value=float(f"{value:.6g}"),
        )
        for name, value in evaluation.items()
        if name != "step"
    ]


def _describe_metric(name: str) -> str:
    return _METRICS.get(name, name.replace("_", " "))


# ---- text ----


def make_text(facts: CardFacts, has_plot: bool = False) -> str:
    """The text of our section of the card, in Markdown.

    Args:
        facts: see [`CardFacts`].
        has_plot: whether `comparison.png` is beside the card.
    """
    parts = [
        _describe_method(facts),
        "## Stages",
        _stage_table(facts.record),
        "## Evaluation",
        _describe_evaluation(facts),
    ]
    if has_plot:
        parts.append(f"![Comparison of methods by training examples and by operations]({PLOT_FILE})")
    parts += ["## Training cost", _describe_cost(facts), "## How to load", _describe_loading(facts)]
    parts += ["## Provenance", _describe_provenance(facts.record), "## Citation", f"```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts)


def _name_teacher(record: Mapping[str, Any]) -> str:
    teacher, on_hub = record["teacher"], teachers_on_hub(record)
    if on_hub:
        return ", ".join(f"[{name}](https://huggingface.co/{name})" for name in on_hub)
    return f"`{teacher['name']}`, which is not on the Hub" if teacher else "no teacher"


def _describe_method(facts: CardFacts) -> str:
    record = facts.record
    role = "was distilled from" if _teaches(record) else "was compared with"
    teacher = f"{role} {_name_teacher(record)}" if record["teacher"] else "has no teacher"
    data = f" on [{i}](https://huggingface.co/datasets/{i})" if (i := (facts.train_data or {}).get("id")) else ""
    step, end = facts.step, record["max_steps"]
    unfinished = "" if step >= end else f" This is step {step:,} of {end:,}."
    method = _METHODS[record["method"]].replace("logits", _outputs(record))
    return f"This {facts.model_class} {teacher}{data}. {method}{unfinished}"


def _outputs(record: Mapping[str, Any]) -> str:
    """What the logit stage compares."""
    return "embeddings" if record["settings"].get("pooling") else "logits"


def _spans(record: Mapping[str, Any]) -> Iterable[tuple[int, int, Mapping[str, Any]]]:
    """First step, from 1, and last step of each stage."""
    first = 1
    for stage in record["stages"]:
        end = stage["until"] or record["max_steps"]
        yield first, end, stage
        first = end + 1


def _stage_table(record: Mapping[str, Any]) -> str:
    rows = [["stage", "steps", "student layer ← teacher layer", "hidden", _outputs(record), "labels"]]
    for number, (first, end, stage) in enumerate(_spans(record), start=1):
        pairs = ", ".join(f"{student} ← {teacher}" for student, teacher in stage["hidden"]) or "-"
        hidden, at_end = stage["hidden_weight"], stage.get("hidden_weight_at_end")
        hidden = f"{hidden:g}" if at_end is None else f"{hidden:g} to {at_end:g}"
        weights = [hidden if stage["hidden"] else "-", *(f"{stage[n]:g}" for n in ("kl_weight", "label_weight"))]
        rows.append([f"{number}: {stage['name']}", f"{first:,} to {end:,}", pairs, *weights])
    settings = record["settings"]
    note = f"The last three columns are weights of losses: `{settings['hidden_loss']}` of hidden states, "
    if settings.get("pooling"):
        note += f"`{settings['hidden_loss']}` of embeddings (pooling: `{settings['pooling']}`), "
    else:
        note += f"`{settings['divergence']}` of logits at temperature {settings['temperature']:g}, "
    note += "cross-entropy on labels. Layers are numbers of blocks, from 1; 0 is the embeddings."
    return f"{_markdown_table(rows)}\n\n{note}"


def _describe_evaluation(facts: CardFacts) -> str:
    evaluation = last_evaluation(facts.log_history, facts.step)
    if not evaluation:
        return "The student was not evaluated."
    step = evaluation.pop("step")
    names = [*(name for name in _METRICS if name in evaluation), *(n for n in evaluation if n not in _METRICS)]
    table = _markdown_table([["metric", "value"], *([_describe_metric(n), f"{evaluation[n]:.4g}"] for n in names)])
    data = facts.eval_data
    where = f"on `{' '.join(str(part) for part in data.values() if part)}`" if data else "on held-out data"
    if facts.train_data is not None and facts.train_data == data:
        where = "on the training data"
    # a head that no stage has trained so far
    trained = any(s["kl_weight"] or s["label_weight"] for first, _, s in _spans(facts.record) if first <= step)
    untrained = "" if trained else " No stage up to this step trains the head."
    return f"Fidelity to the teacher and to the labels, {where}, at step {step:,}:{untrained}\n\n{table}"


def _describe_cost(facts: CardFacts) -> str:
    record = facts.record
    student, teacher, hours = record["student_flops"], record["teacher_flops"], record["train_seconds"] / 3600
    rows = [
        ["cost", "value"],
        ["optimizer steps", f"{record['step']:,}"],
        ["training examples", f"{record['step'] * record['samples_per_step']:,}"],
        ["floating-point operations, student", f"{student:.3g}"],
        ["floating-point operations, teacher", f"{teacher:.3g}"],
        ["hours", f"{f'{hours:.3g}' if hours >= 0.01 else 'less than 0.01'} on {facts.device}"],
    ]
    return _markdown_table(rows)


def _describe_loading(facts: CardFacts) -> str:
    if facts.is_adapter:
        base = f'AutoPeftModel.from_pretrained("{facts.name}")'
        return f"```python\nfrom peft import AutoPeftModel\n\nmodel = {base}\n```"
    lines = [f"from transformers import {facts.model_class}", ""]
    lines.append(f'model = {facts.model_class}.from_pretrained("{facts.name}")')
    return "\n".join(["The student is a plain Transformers model.", "", "```python", *lines, "```"])


def _describe_provenance(record: Mapping[str, Any]) -> str:
    teacher = record["teacher"] or {}
    entries = {
        "Teacher's revision": teacher.get("revision"),
        "Fingerprint of the teacher's weights": teacher.get("fingerprint"),
        "Fingerprint of the projection bank": record["projection_bank"],
        "Seed": record["seed"],
    }
    lines = [f"- {name}: `{value}`" for name, value in entries.items() if value is not None]
    lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    return "\n".join([*lines, "", "`curriculum.json` has every setting of the run."])


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first as its heading.

    >>> print(_markdown_table([["metric", "value"], ["loss", "0.5"]]))
    | metric | value |
    |:--|:--|
    | loss | 0.5 |
    """
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|" + ":--|" * len(rows[0]), *others])
