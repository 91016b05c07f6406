"""What a run will cost, before it runs: checks, stages, operations, time and memory, found on models without values."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, BertConfig, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as hf_logging

from hf_curriculum_distill.checks import check_cache, check_launch, check_stages
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.counting import predicts_next_token
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.loading import check_teacher, load_teacher
from hf_curriculum_distill.online import OnlineTeacher
from hf_curriculum_distill.options import ModelOptions
from hf_curriculum_distill.planning.dry_run import DryRun
from hf_curriculum_distill.planning.memory import PeakMemory
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.report import align
from hf_curriculum_distill.results import printable
from hf_curriculum_distill.stages import Stage, StageScheduler, num_frozen_layers, parse_layer_pairs
from hf_curriculum_distill.teachers import Teacher, check_schedule, find_checkpoints, schedule_ends

SIZES = {"bert-large": (24, 1024), "bert-large-narrow": (24, 512), "bert-base": (12, 768)}
TASKS = ("MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification")
# Options of the recipes that no plan depends on; the tests hold this against the recipes.
RECIPE_OPTIONS = {
    "compare_with", "dataset", "dataset_config", "dimension", "earlier_teachers", "eval_blocks", "evaluate_on",
    "first_checkpoint", "grammar", "head_dim", "heldout_documents", "heldout_examples", "heldout_sentences",
    "initializer_range", "mask_once", "max_length", "methods", "model", "num_layers", "preprocessing_workers",
    "seeds", "shuffle_features", "sparsity", "start", "streaming", "student_heads", "student_width", "support",
    "support_seed", "teacher_accuracy", "teacher_batch_size", "teacher_finish_samples", "teacher_heads",
    "teacher_max_samples", "teacher_save_samples", "teacher_save_steps", "teacher_seed", "teacher_steps",
    "teacher_width", "text_column", "train_sentences", "variants",
}  # fmt: skip
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "spm", "merges", "tekken", "bpe")
_MEMORY = ("teacher", "student", "gradients", "optimizer", "activations", "logits")


@dataclass
class PlanArguments(ModelOptions):
    """What a run consists of beside its [`CurriculumDistillationConfig`]; the names are those of the recipes.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    task: str = field(default="MaskedLM", metadata={"help": f"What both models do: {', '.join(TASKS)}."})
    num_processes: int = field(default=1, metadata={"help": "Processes that share each step, one a device."})
    flops_per_second: float | None = field(
        default=None, metadata={"help": "Operations a second that one device reaches in such a training."}
    )
    measure: float | None = field(
        default=None, metadata={"help": "Or: so many seconds of matrix products here, for --utilisation of their rate."}
    )
    utilisation: float = field(default=0.4, metadata={"help": "Share of that rate which training is assumed to reach."})
    json: str | None = field(default=None, metadata={"help": "File to which the plan is written as well."})

    def __post_init__(self):
        if self.student is None:
            raise ValueError("No student is given; name its folder, config.json, Hub model or size with --student.")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; use one of {', '.join(TASKS)}.")
        if self.flops_per_second is not None and self.measure is not None:
            raise ValueError("Both flops_per_second and measure are given; the time follows from one of them.")
        for name, highest in {"mlm_probability": 1, "utilisation": 1, "flops_per_second": None, "measure": 60}.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= (highest or value):
                limits = "above 0" + (f" and at most {highest}" if highest else "")
                raise ValueError(f"{name} is {value}; it must be {limits}.")
        for name in ("block_size", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mlm_probability is None:
            self.mlm_probability = 0.15 if self.task == "MaskedLM" else 1.0


@dataclass
class PlannedConfig(CurriculumDistillationConfig):
    """The configuration of a run on a machine that need not be this one: no accelerator is asked for here."""

    def __post_init__(self):
        on_cpu, self.use_cpu, self.tf32 = self.use_cpu, True, None
        super().__post_init__()
        check_launch(self, None)  # settles the device
        self.use_cpu = on_cpu


@dataclass
class Plan:
    """`checks` are `(ok | skip | error, what, detail)`; where one failed, there are no costs."""

    checks: list[tuple[str, str, str]] = field(default_factory=list)
    layer_map: list[tuple[int, int]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    total: dict[str, Any] = field(default_factory=dict)
    one_shot: dict[str, Any] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [f"{name}: {detail}" for outcome, name, detail in self.checks if outcome == "error"]

    def check(self, name: str, examine: Callable, *args: Any) -> Any:
        """Note what `examine` says: it returns a detail and a result (None: not there), or raises."""
        try:
            detail, result = examine(*args)
            outcome = "skip" if result is None else "ok"
        except Exception as error:  # of any kind: what a damaged file makes transformers do is anybody's guess
            known = isinstance(error, (ValueError, OSError))
            detail, result, outcome = f"{error}" if known else f"{type(error).__name__}: {error}", None, "error"
        self.checks.append((outcome, name, printable(textwrap.shorten(detail, 1000, placeholder=" ..."))))
        return result


def make_plan(options: PlanArguments, args: CurriculumDistillationConfig) -> Plan:
    """Check a run and add up what it will cost. No weights are read or made, however large the models are."""
    plan = Plan()
    tokenizer = plan.check("tokenizer", _load_tokenizer, options)
    run = plan.check("models", _build, options, args, tokenizer)
    if run is None:
        return plan
    plan.check("vocabulary", _check_vocabulary, options, run, tokenizer)
    if run.teacher is not None and find_size(_teacher_name(options)) is None:
        plan.check("teacher's weights", _check_weights, _teacher_folders(options, args), run)
    plan.check("batch", _check_batch, options, run)
    stages = plan.check("layer map", _check_layer_map, run)
    scheduler = stages and plan.check("steps", _check_steps, stages, options, args)
    if plan.errors:
        return plan
    (rate, assumption), online, optimizer = _find_rate(options, args), args.method == "online", _Optimizer(args)
    plan.stages = plan.check("dry run", _run_dry, run, scheduler, options.num_processes, rate, online, optimizer) or []
    if plan.errors:
        return plan
    plan.layer_map, plan.total = _pairs(stages), _add_up("total", plan.stages)
    if run.teacher is not None:
        alone = StageScheduler([Stage(kl_weight=1.0, label_weight=args.label_loss_weight)], args.max_steps)
        _, rows = _run_dry(run, alone, options.num_processes, rate, online=False, optimizer=optimizer)
        plan.one_shot = _add_up("one_shot", rows)
    plan.assumptions = [
        assumption,
        "operations: matrix products of all processes, a backward pass as two forward; no padding, no evaluations",
        "memory: of one process; each column the most it ever is, the total that of one moment; with the teacher its "
        "projections; without sharding, DDP's buckets, fragmentation and the device's own",
    ]
    if optimizer.untried:
        plan.assumptions.append(
            f"optimizer: {args.optim.value} is counted as Adam, for it cannot be tried here: {optimizer.untried}"
        )
    if args.teacher_cache is not None:
        plan.assumptions.append("teacher_cache: not counted; the data say what it saves, before training starts")
    return plan


def format_plan(plan: Plan) -> str:
    """The plan as text: checks, layer map, a table of operations and time, one of memory."""
    lines = [f"{outcome:5}  {name}: {detail}" for outcome, name, detail in plan.checks]
    if plan.errors:
        return "\n".join(lines)
    lines += ["", *(f"student layer {student} <- teacher layer {teacher}" for student, teacher in plan.layer_map)]
    costs = [["stage", "steps", "parameters trained", "student TFLOPs", "teacher TFLOPs", "TFLOPs", "time"]]
    memory = [["GiB at most", *_MEMORY, "at once"]]
    for row in filter(None, [*plan.stages, plan.total, plan.one_shot]):
        flops = [_tera(row[name]) for name in ("student_flops", "teacher_flops", "flops")]
        steps = f"{row['first_step']:,}-{row['last_step']:,}"
        costs.append([row["name"], steps, f"{row['trained_parameters']:,}", *flops, _duration(row["seconds"])])
        memory.append([row["name"], *(f"{size / 2**30:,.3f}" for size in row["memory"].values())])
    lines += ["", align(costs), "", align([row for row in memory if row[0] != "total"])]
    if plan.one_shot:
        lines += ["", f"operations: {plan.total['flops'] / plan.one_shot['flops']:.3f} of one_shot's at the same steps"]
    return "\n".join([*lines, *plan.assumptions])


def find_size(name: str) -> tuple[int, int] | None:
    """Blocks and hidden size that a name as `bert-6-768` or `bert-large` stands for, if nothing else is called so."""
    size = re.fullmatch(r"bert-(\d+)-(\d+)", name)
    if os.path.exists(name) or not (size or name in SIZES):
        return None
    return tuple(map(int, size.groups())) if size else SIZES[name]


def find_config(name: str, dropout: float = 0.1, **bert: Any) -> PreTrainedConfig:
    """The configuration of a model's folder, config.json or Hub repository, or of a size: see [`find_size`].

    Raises:
        OSError: there is none.
    """
    if (size := find_size(name)) is not None:
        layers, hidden = size
        return BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=4 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **bert,
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name!r} has no configuration within reach; give a model's folder, a config.json, a Hub model, or a "
            f"size: {', '.join(SIZES)}, bert-LAYERS-HIDDEN. ({str(error).splitlines()[0]})"
        ) from error


# ---- checks: each returns a detail and a result ----


def _teacher_name(options: PlanArguments) -> str | None:
    there = options.teacher is not None and os.path.isfile(os.path.join(options.teacher, "config.json"))
    return options.teacher if there or options.teacher_size is None else options.teacher_size


def _teacher_folders(options: PlanArguments, args: CurriculumDistillationConfig) -> list[str]:
    """The teacher or, with method='progressive', its checkpoints as the run will find them."""
    name = _teacher_name(options)
    return find_checkpoints(name) if args.method == "progressive" else [name]


def _load_tokenizer(options: PlanArguments) -> tuple[str, Any]:
    name = options.tokenizer or _teacher_name(options)
    if options.tokenizer is None and (name is None or os.path.isfile(name) or find_size(name)):
        return "none is given; vocabularies are compared by size only", None
    try:
        if os.path.isdir(name) and not any(file.startswith(_TOKENIZER_FILES) for file in os.listdir(name)):
            raise FileNotFoundError(f"{name} has no tokenizer's files.")  # AutoTokenizer would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if options.tokenizer is not None:
            raise
        return f"none within reach at {name} ({type(error).__name__}); vocabularies are compared by size only", None
    return f"{len(tokenizer):,} tokens ({name})", tokenizer


def _build(options: PlanArguments, args: CurriculumDistillationConfig, tokenizer: Any) -> tuple[str, DryRun]:
    """Both models as the run would have them, but for their values."""
    vocabulary = {} if tokenizer is None else {"vocab_size": len(tokenizer)}
    name = _teacher_name(options)
    name = name and _teacher_folders(options, args)[-1]
    teacher_config = name and find_config(name, options.dropout, **vocabulary)
    if teacher_config and not vocabulary:
        vocabulary = {"vocab_size": getattr(teacher_config, "vocab_size", None)}
    student_config = find_config(options.student, options.dropout, **vocabulary)
    auto, teacher = getattr(transformers, f"AutoModelFor{options.task}"), None
    online = args.method == "online"
    mode = FakeTensorMode()
    with mode:
        student = PartialForward(_make_model(auto, student_config).train())
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name, the old one
            if getattr(args, name, False):
                getattr(student.model, f"{name}_enable")(getattr(args, f"{name}_kwargs"))
                break
        if teacher_config:
            dtype = "float32" if online else args.teacher_dtype
            teacher = (OnlineTeacher if online else Teacher)(_make_model(auto, teacher_config, dtype))
    models = {"student": student, "teacher": teacher.partial_forward} if teacher else {"student": student}
    detail = "; ".join(
        f"{who} {type(one.model).__name__}, {one.depth} blocks, hidden size {one.hidden_size}, "
        f"{one.model.num_parameters():,} parameters"
        for who, one in models.items()
    )
    batch_size, length = args.per_device_train_batch_size, options.block_size
    ids_shape = labels_shape = batch_size, length
    num_rows = batch_size * round(options.mlm_probability * (length - predicts_next_token(student.model)))
    if options.task == "SequenceClassification":
        labels_shape, num_rows = (batch_size,), batch_size
    return detail, DryRun(mode, student, teacher, args, ids_shape, labels_shape, num_rows)


def _make_model(auto: Any, config: PreTrainedConfig, dtype: str | None = None) -> PreTrainedModel:
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise ValueError(f"A {config.model_type} is no single stack of blocks that reads tokens; no other is planned.")
    if getattr(config, "num_hidden_layers", 0) > 10_000:
        raise ValueError(f"The model has {config.num_hidden_layers} blocks, more than any that is trained; correct it.")
    try:
        with no_init_weights():
            model = auto.from_config(config, **({"dtype": getattr(torch, dtype)} if dtype else {}))
    except ValueError as error:
        reason = str(error).split(".\n")[0]
        raise ValueError(f"There is no {auto.__name__} of type {config.model_type} ({reason}); set task.") from error
    model.tie_weights()
    return model


def _check_vocabulary(options: PlanArguments, run: DryRun, tokenizer: Any) -> tuple[str, bool]:
    size = run.student.model.config.vocab_size
    if tokenizer is not None and len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the student's vocabulary {size:,} entries; build the "
            "student with vocab_size=len(tokenizer)."
        )
    if run.teacher is None:
        return f"{size:,} entries", True
    name = _teacher_name(options)
    check_teacher(run.student.model, run.teacher.model, tokenizer, None if _is_alone(name) else name)
    return f"{size:,} entries in both models", True


def _is_alone(name: str) -> bool:
    """Whether a model's name is a size or a config.json, without anything beside it."""
    return os.path.isfile(name) or find_size(name) is not None


def _check_weights(folders: Sequence[str], run: DryRun) -> tuple[str, bool | None]:
    """Whether the run will be able to load the teacher: it goes through the same function, without values."""
    model = run.teacher.model
    for folder in folders:
        if _has_file(folder, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            with _quiet():  # what transformers reports, the error says
                load_teacher(folder, run.student.model, without_values=True)
            continue
        if os.path.isdir(folder) and not _has_file(folder, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            raise FileNotFoundError(
                f"{folder} has a config.json, but no weights, so there is nothing to learn from; save the whole model "
                "there or, to plan without its weights, name the config.json."
            )
        saved = set(AutoConfig.from_pretrained(folder).architectures or ())
        if saved and saved <= set(MODEL_MAPPING_NAMES.values()) - {type(model).__name__}:
            raise ValueError(
                f"The configuration of {folder} says that it is a {', '.join(sorted(saved))}, which has no head; as a "
                f"{type(model).__name__} its head would be random. Use a checkpoint that was trained for this task."
            )
        says = f"; its configuration names {', '.join(sorted(saved))}" if saved else ""
        return f"{folder} has no safetensors file within reach: whether its head was trained is not known{says}", None
    return f"all that a {type(model).__name__} needs, by name and size", True


@contextmanager
def _quiet() -> Iterator[None]:
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def _has_file(folder: str, *names: str) -> bool:
    """Whether a model's folder, or the Hub's cache on this machine, has one of the files."""
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    local = {"local_files_only": True, **lenient}
    return not _is_alone(folder) and any(cached_file(folder, name, **local) is not None for name in names)


def _check_batch(options: PlanArguments, run: DryRun) -> tuple[str, bool]:
    for who, model in (("student", run.student), ("teacher", run.teacher)):
        longest = model and _longest(model.model)
        if longest and options.block_size > longest:
            raise ValueError(f"block_size is {options.block_size}, but the {who} reads at most {longest} tokens.")
    if not run.num_rows:
        raise ValueError(
            f"mlm_probability is {options.mlm_probability}, with which no label counts in {run.ids_shape[0]} examples "
            f"of {options.block_size} tokens; raise it, or the batch."
        )
    shape = run.ids_shape[0], run.args.gradient_accumulation_steps, options.num_processes
    examples = shape[0] * shape[1] * shape[2]
    detail = f"{shape[0]} examples x {shape[1]} micro-batches x {shape[2]} processes = {examples:,} examples or "
    detail += f"{examples * options.block_size:,} tokens a step; in a micro-batch {run.num_rows:,} labels count"
    return detail, True


def _longest(model: PreTrainedModel) -> int | None:
    """How many tokens a model's table of positions is for; None where positions are computed."""
    size, inputs = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    for table in model.modules():
        # OPT and BART keep two more rows; RoBERTa's positions start after that of padding
        if isinstance(table, nn.Embedding) and table is not inputs and table.num_embeddings in (size, (size or 0) + 2):
            return size if table.padding_idx is None else size - table.padding_idx - 1
    return None


def _check_layer_map(run: DryRun) -> tuple[str, tuple[Stage, ...]]:
    depths = run.student.depth, run.teacher and run.teacher.partial_forward.depth
    stages = run.args.resolve_stages(*depths)
    if not stages:
        raise ValueError("There is no teacher and there are no stages, which is plain training; name a --teacher.")
    check_stages(stages, run.args, run.student, deepspeed=bool(run.args.deepspeed))
    check_cache(stages, run.args, run.student.model)
    if pairs := parse_layer_pairs(_pairs(stages)):
        run.student.check_training(run.args.freeze_matched_layers or run.args.train_prefix == "block")
        widths = [run.student.hidden_size], [run.teacher.partial_forward.hidden_size]
        ProjectionBank.create(pairs[:1], *widths, kind=run.args.projection)
    return f"{len(pairs)} layers of {depths[0]} learn from the teacher's {depths[1] or 0}", stages


def _pairs(stages: Sequence[Stage]) -> list[tuple[int, int]]:
    return list(dict.fromkeys(pair for stage in stages for pair in stage.hidden))


def _check_steps(
    stages: Sequence[Stage], options: PlanArguments, args: CurriculumDistillationConfig
) -> tuple[str, StageScheduler]:
    max_steps = args.max_steps
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; a plan has no data set to count epochs of, so set max_steps.")
    scheduler = args.schedule(stages, max_steps)
    if args.method == "progressive" and _teacher_name(options) is not None:
        folders = _teacher_folders(options, args)
        check_schedule(folders, args.teacher_schedule)
        schedule_ends(folders, args.teacher_schedule, max_steps)
    return f"{len(stages)} stages in {max_steps:,} steps", scheduler


# ---- costs ----


class _Optimizer:
    """Bytes of the run's optimizer, by trying it on parameters that have a shape only.

    Attributes:
        untried: why that fails here, if it does; the optimizer is then counted as Adam.
    """

    def __init__(self, args: CurriculumDistillationConfig):
        self.untried: str | None = None
        self._args, self._known = args, {}

    def measure(self, parameter: Tensor, embeds: bool = False) -> tuple[int, int]:
        """What is held for a parameter from its first step on, and what each step needs beside."""
        kind = parameter.shape, parameter.dtype, embeds
        if kind not in self._known:
            try:
                self._known[kind] = self._step(*kind)
            except Exception as error:  # whatever its library raises
                self.untried = f"{type(error).__name__}: {error}".splitlines()[0]
                self._known[kind] = 2 * _num_bytes([parameter]), 0
        return self._known[kind]

    def _step(self, shape: torch.Size, dtype: torch.dtype, embeds: bool) -> tuple[int, int]:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(self._args)
        fused = options.pop("fused", False)  # which needs values, and no memory
        if embeds and options.get("optim_bits") == 8:
            options["optim_bits"] = 32  # Trainer's own exception
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        optimizer = optimizer_class([parameter], **options)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with PeakMemory() as memory:
            optimizer.step()
        states = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim()]
        return sum(map(_stored_bytes, states)), 0 if fused else memory.peak


def _run_dry(
    run: DryRun,
    scheduler: StageScheduler,
    num_processes: int,
    rate: float | None,
    online: bool,
    optimizer: _Optimizer,
) -> tuple[str, list[dict[str, Any]]]:
    """One row a stage."""
    args, stages, rows, stepped = run.args, scheduler.stages, [], set()
    parameters = dict(run.student.model.named_parameters())
    embeddings = {id(m.weight) for m in run.student.model.modules() if isinstance(m, torch.nn.Embedding)}
    states = {name: optimizer.measure(p, embeds=id(p) in embeddings) for name, p in parameters.items()}
    student = _model_bytes(run.student.model)
    teacher = _model_bytes(run.teacher.model) if run.teacher else 0
    projections = len(_pairs(stages)) and run.student.hidden_size * (run.teacher.partial_forward.hidden_size + 2) * 4
    teacher += len(_pairs(stages)) * projections
    learning = list(run.teacher.model.parameters()) if online else []
    teacher += sum(optimizer.measure(parameter)[0] for parameter in learning)
    teacher_gradients = _num_bytes(learning)
    for index, stage in enumerate(stages):
        first, end = scheduler.span(index)
        frozen = num_frozen_layers(stages, index, args.train_prefix, args.freeze_matched_layers)
        times = (end - first) * args.gradient_accumulation_steps * num_processes
        try:
            *flops, trained, peak = run.measure(stage, frozen, online)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"Stage {stage.name!r} cannot be run without values ({str(error).splitlines()[0]}): a model whose "
                "computation depends on values is not planned."
            ) from error
        student_flops, teacher_flops = (times * each for each in flops)
        stepped |= trained  # an optimizer keeps what it has for parameters that later stages leave alone
        held = sum(states[name][0] for name in stepped)
        gradients = _num_bytes(parameters[name] for name in trained)
        if args.gradient_accumulation_steps == 1:
            at_once = peak.peak_with_gradients
        else:  # later micro-batches find the gradients of those before
            at_once = peak.peak + gradients + teacher_gradients
        at_once = max(at_once, gradients + max((states[name][1] for name in trained), default=0))
        memory = {
            "teacher": teacher + teacher_gradients,
            "student": student,
            "gradients": gradients,
            "optimizer": held,
            "activations": peak.peak - peak.peak_of_size,
            "logits": peak.peak_of_size,
            "total": teacher + student + held + at_once,
        }
        rows.append(
            {
                "name": stage.name,
                "first_step": first + 1,
                "last_step": end,
                "trained_parameters": sum(parameters[name].numel() for name in trained),
                "student_flops": student_flops,
                "teacher_flops": teacher_flops,
                "flops": student_flops + teacher_flops,
                "seconds": rate and (student_flops + teacher_flops) / (rate * num_processes),
                "memory": memory,
            }
        )
    return f"{len(rows)} stages", rows


def _model_bytes(model: PreTrainedModel) -> int:
    return _num_bytes([*model.parameters(), *model.buffers()])


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored_bytes(tensor: Tensor) -> int:
    """Of what a tensor consists of: a quantised one is a pair of others."""
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(_stored_bytes(getattr(tensor, part)) for part in parts) or _num_bytes([tensor])


def _add_up(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All stages as one row: sums of what is spent, the largest of what is held."""
    largest = max(rows, key=lambda row: row["memory"]["total"])
    total = {n: sum(row[n] for row in rows) for n in ("student_flops", "teacher_flops", "flops")}
    seconds = None if rows[0]["seconds"] is None else sum(row["seconds"] for row in rows)
    trained = max(row["trained_parameters"] for row in rows)
    return {"name": name, "first_step": 1, "last_step": rows[-1]["last_step"], "trained_parameters": trained} | (
        total | {"seconds": seconds, "memory": largest["memory"]}
    )


def _find_rate(options: PlanArguments, args: CurriculumDistillationConfig) -> tuple[float | None, str]:
    """Operations a second of one device, and where the number comes from."""
    if options.flops_per_second is not None:
        return options.flops_per_second, f"time: at {options.flops_per_second:.3g} FLOP/s a device, as given"
    if options.measure is None:
        return None, "time: give --flops_per_second, or --measure SECONDS on the machine that will train"
    ceiling, described = _measure_products(options.measure, args)
    return options.utilisation * ceiling, (
        f"time: at {options.utilisation:g} (an assumption: --utilisation) of {ceiling:.3g} FLOP/s a device, {described}"
    )


def _measure_products(seconds: float, args: CurriculumDistillationConfig) -> tuple[float, str]:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    size = 1024 if on_cpu else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        matrix @ matrix
        if not on_cpu:
            torch.accelerator.synchronize()

    multiply()  # warms up
    num_products, start = 0, time.perf_counter()
    while not num_products or time.perf_counter() - start < seconds:
        multiply()
        num_products += 1
    rate = 2 * size**3 * num_products / (time.perf_counter() - start)
    return rate, f"measured here: {str(dtype).split('.')[1]} products of {size} x {size} matrices on {device.type}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e17 else f"{flops / 1e12:,.5g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
