"""What a run will cost, before it runs: checks, stages, operations, time and memory, found on models without values."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_curriculum_distill.checks import check_launch, check_stages
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.cost import DryRun
from hf_curriculum_distill.counting import predicts_next_token
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.loading import check_teacher
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.report import align
from hf_curriculum_distill.stages import Stage, StageScheduler, num_frozen_layers

SIZES = {"bert-large": (24, 1024), "bert-large-narrow": (24, 512), "bert-base": (12, 768)}
TASKS = ("MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification")
_OPTIMIZER_VALUES = {"sgd": 0, "rmsprop": 1, "adagrad": 1}  # held for a trained parameter; all others: Adam's 2
_MEMORY = ("teacher", "student", "gradients", "optimizer", "activations", "logits")


@dataclass
class PlanArguments:
    """What a run consists of beside its [`CurriculumDistillationConfig`]; the names are those of the recipes.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    student: str | None = field(
        default=None,
        metadata={"help": "Student: a model's folder, a config.json, a Hub model, or a size as bert-LAYERS-HIDDEN."},
    )
    teacher: str | None = field(default=None, metadata={"help": "Teacher, as --student."})
    teacher_size: str | None = field(
        default=None, metadata={"help": "Its size, where it is still to be trained into the folder --teacher."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the teacher's."})
    task: str = field(default="MaskedLM", metadata={"help": f"What both models do: {', '.join(TASKS)}."})
    block_size: int = field(default=512, metadata={"help": "Tokens of an example."})
    mlm_probability: float | None = field(
        default=None, metadata={"help": "Share of the tokens whose label counts: 0.15 for a MaskedLM, else 1."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout of models that are given by size."})
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
        except (ValueError, OSError) as error:
            detail, result, outcome = " ".join(str(error).split()), None, "error"
        self.checks.append((outcome, name, detail))
        return result


def make_plan(options: PlanArguments, args: CurriculumDistillationConfig) -> Plan:
    """Check a run and add up what it will cost. No weights are read or made, however large the models are."""
    plan = Plan()
    tokenizer = plan.check("tokenizer", _load_tokenizer, options)
    run = plan.check("models", _build, options, args, tokenizer)
    if run is None:
        return plan
    plan.check("vocabulary", _check_vocabulary, options, run, tokenizer)
    plan.check("batch", _check_batch, options, run)
    stages = plan.check("layer map", _check_layer_map, run)
    scheduler = stages and plan.check("steps", _check_steps, stages, args)
    if plan.errors:
        return plan
    (rate, assumption), online = _find_rate(options, args), args.method == "online"
    plan.stages = plan.check("dry run", _run_dry, run, scheduler, options.num_processes, rate, online) or []
    if plan.errors:
        return plan
    plan.layer_map, plan.total = _pairs(stages), _add_up("total", plan.stages)
    if run.teacher is not None:
        alone = StageScheduler([Stage(kl_weight=1.0, label_weight=args.label_loss_weight)], args.max_steps)
        plan.one_shot = _add_up("one_shot", _run_dry(run, alone, options.num_processes, rate, online=False)[1])
    plan.assumptions = [
        assumption,
        "operations: matrix products of all processes, a backward pass as two forward; no padding, no evaluations",
        "memory: of one process at the worst moment of a step; with the teacher its projections; without sharding, "
        "DDP's buckets, fragmentation and the device's own",
    ]
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
    memory = [["GiB at once", *_MEMORY, "total"]]
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


def _load_tokenizer(options: PlanArguments) -> tuple[str, Any]:
    name = options.tokenizer or _teacher_name(options)
    if options.tokenizer is None and (name is None or os.path.isfile(name) or find_size(name)):
        return "none is given; vocabularies are compared by size only", None
    try:
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
            teacher = PartialForward(_make_model(auto, teacher_config, dtype).eval().requires_grad_(online))
    models = {"student": student, "teacher": teacher} if teacher else {"student": student}
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
    folder = options.teacher if os.path.isdir(options.teacher or "") else None
    check_teacher(run.student.model, run.teacher.model, tokenizer, folder)
    return f"{size:,} entries in both models", True


def _check_batch(options: PlanArguments, run: DryRun) -> tuple[str, bool]:
    for who, model in (("student", run.student), ("teacher", run.teacher)):
        longest = model and getattr(model.model.config, "max_position_embeddings", None)
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


def _check_layer_map(run: DryRun) -> tuple[str, tuple[Stage, ...]]:
    depths = run.student.depth, run.teacher and run.teacher.depth
    stages = run.args.resolve_stages(*depths)
    if not stages:
        raise ValueError("There is no teacher and there are no stages, which is plain training; name a --teacher.")
    check_stages(stages, run.args, run.student, deepspeed=bool(run.args.deepspeed))
    if pairs := _pairs(stages):
        run.student.check_training(run.args.freeze_matched_layers or run.args.train_prefix == "block")
        widths = [run.student.hidden_size], [run.teacher.hidden_size]
        ProjectionBank.create(pairs[:1], *widths, kind=run.args.projection)
    return f"{len(pairs)} layers of {depths[0]} learn from the teacher's {depths[1] or 0}", stages


def _pairs(stages: Sequence[Stage]) -> list[tuple[int, int]]:
    return list(dict.fromkeys(pair for stage in stages for pair in stage.hidden))


def _check_steps(stages: Sequence[Stage], args: CurriculumDistillationConfig) -> tuple[str, StageScheduler]:
    if args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}; a plan has no data set to count epochs of, so set max_steps.")
    return f"{len(stages)} stages in {args.max_steps:,} steps", args.schedule(stages, args.max_steps)


# ---- costs ----


def _run_dry(
    run: DryRun, scheduler: StageScheduler, num_processes: int, rate: float | None, online: bool
) -> tuple[str, list[dict[str, Any]]]:
    """One row a stage."""
    args, stages, rows, stepped = run.args, scheduler.stages, [], set()
    parameters = dict(run.student.model.named_parameters())
    values = next((n for name, n in _OPTIMIZER_VALUES.items() if args.optim.startswith(name)), 2)
    teacher = _model_bytes(run.teacher.model) if run.teacher else 0
    if online:  # with gradients and optimizer of its own
        teacher += (1 + values) * _num_bytes(run.teacher.model.parameters())
    projections = len(_pairs(stages)) and run.student.hidden_size * (run.teacher.hidden_size + 2) * 4
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
        memory = (
            teacher + len(_pairs(stages)) * projections,
            _model_bytes(run.student.model),
            _num_bytes(parameters[name] for name in trained),
            values * _num_bytes(parameters[name] for name in stepped),
            peak.peak - peak.peak_of_size,
            peak.peak_of_size,
        )
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
                "memory": dict(zip(_MEMORY, memory, strict=True)) | {"total": sum(memory)},
            }
        )
    return f"{len(rows)} stages", rows


def _model_bytes(model: PreTrainedModel) -> int:
    return _num_bytes([*model.parameters(), *model.buffers()])


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
