"""The report of a student's fidelity from its folder, its teacher and a text: `hf-curriculum-distill fidelity`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    default_data_collator,
)
from transformers.models.auto import modeling_auto

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.options import TextOptions
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.projections.files import FILE_NAME as BANK_FILE
from hf_curriculum_distill.report.fidelity import measure_fidelity
from hf_curriculum_distill.report.fidelity_page import fidelity_page
from hf_curriculum_distill.report.results import read_json, require
from hf_curriculum_distill.resuming.record import FILE_NAME as RECORD_FILE
from hf_curriculum_distill.stages import Stage, matched_pairs
from hf_curriculum_distill.tasks.classification import class_numbers, encode, read_task
from hf_curriculum_distill.tasks.documents import evaluated_blocks, load_documents
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, pack_blocks, pack_causal_blocks
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

_MASKED = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
_CAUSAL = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_CLASSIFIERS = set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def report_fidelity(
    options: TextOptions, batch_size: int = 16, num_examples: int = 10
) -> tuple[dict[str, float], bytes]:
    """Load student and teacher, compare them on held-out text, and make the page.

    Where the student's folder has a projection bank and `curriculum.json`, its layers are compared, too.

    Args:
        options: `student` and `teacher` (folders or Hub models), `dataset` and how it is read, `block_size` (tokens of
            a block or, of a labelled text, at most), and `eval_blocks` (examples at most).
        batch_size: examples of a pass.
        num_examples: that the page shows.

    Returns:
        the metrics of [`Fidelity`], and the page.

    Raises:
        ValueError: the student is of another task, or models and data do not fit together.
        OSError: a model or the data set is not within reach.
    """
    student = _load_student(options.student)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.student)
    dataset, collator = _read_examples(student, tokenizer, options)
    fields, bank = _read_layers(options.student)
    with tempfile.TemporaryDirectory() as folder:
        args = CurriculumDistillationConfig(
            folder, per_device_eval_batch_size=batch_size, report_to="none", disable_tqdm=True, **fields
        )
        trainer = CurriculumDistillationTrainer(
            student,
            args,
            collator,
            eval_dataset=dataset,
            processing_class=tokenizer,
            teacher_model=options.teacher,
            projection_bank=bank,
        )
        trainer.remove_callback(PrinterCallback)  # the metrics are the report's
        fidelity = measure_fidelity(trainer, num_examples=num_examples)
    title = f"{_last_name(options.student)}, compared with {_last_name(options.teacher)}"
    note = f"{type(student).__name__}, on {len(dataset):,} examples of {_last_name(options.dataset)}"
    classes = dict(student.config.id2label) if type(student).__name__ in _CLASSIFIERS else {}
    return dict(fidelity.metrics), fidelity_page(fidelity, title, note, tokenizer, classes)


def _last_name(source: str) -> str:
    """A Hub name as it is; of a path, the last two parts, which say more than the place on a disk."""
    return "/".join(Path(source).parts[-2:])


def _load_student(name: str) -> PreTrainedModel:
    try:
        architectures = AutoConfig.from_pretrained(name).architectures or ["none"]
    except (OSError, ValueError) as error:
        message = f"The student {name!r} cannot be loaded; name a model's folder or repository. ({error})"
        raise OSError(message) from error
    if architectures[0] not in _MASKED | _CAUSAL | _CLASSIFIERS:
        raise ValueError(
            f"{name} is a {architectures[0]}, and the command reads text for masked and causal language models and for "
            "classifiers; of another model, measure_fidelity(trainer) and fidelity_page(...) make the report."
        )
    return getattr(transformers, architectures[0]).from_pretrained(name)


def _read_examples(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TextOptions
) -> tuple[Any, Any]:
    """Held-out examples, and what makes batches of them."""
    kind = type(student).__name__
    if kind in _CLASSIFIERS:
        column = None if options.text_column == "text" else options.text_column
        task = read_task(options.dataset, options.dataset_config, options.evaluate_on, column)
        heldout = task.heldout.take(min(options.eval_blocks, len(task.heldout)))
        numbers = class_numbers(task, student.config.id2label, options.student)
        encoded = encode(heldout, "text", tokenizer, options.block_size)
        return encoded.add_column("labels", [numbers[label] for label in heldout["label"]]), DataCollatorWithPadding(
            tokenizer
        )
    pack = pack_blocks if kind in _MASKED else pack_causal_blocks
    _, heldout = load_documents(options)
    blocks = evaluated_blocks(pack(heldout, tokenizer, options.block_size, options.text_column), options)
    if kind in _CAUSAL:
        return blocks, default_data_collator
    return blocks, MaskedBlocksCollator(tokenizer, options.mlm_probability or 0.15, fixed_count=True)


def _read_layers(name: str) -> tuple[dict[str, Any], ProjectionBank | None]:
    """The configuration with which a student's layers can be compared, and its bank; else that of its logits alone."""
    paths = [Path(name, file) for file in (RECORD_FILE, BANK_FILE)]
    if not all(map(os.path.isfile, paths)):
        return {"method": "one_shot"}, None
    record = read_json(paths[0])
    require(paths[0], record, "stages")
    pairs = matched_pairs([Stage(hidden=stage.get("hidden") or (), kl_weight=1.0) for stage in record["stages"]])
    settings = record.get("settings") or {}
    kept = {n: settings[n] for n in ("hidden_positions", "standardize_targets") if n in settings}
    fields = {"stages": [Stage(hidden=pairs, kl_weight=1.0)], "evaluate_layers": True}
    return fields | kept, ProjectionBank.from_pretrained(name)
