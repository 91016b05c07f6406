"""Distil a causal language model into a small one of its family.

SmolLM2-135M to 4 blocks of width 192 on Wikipedia, on the GPU of this machine:
    accelerate launch recipes/causal_lm.py
Any teacher, text and student, several methods, one pass of the teacher for all of them:
    accelerate launch recipes/causal_lm.py --teacher openai-community/gpt2 --dataset my_texts/ --student 6-384 \\
        --methods curriculum one_shot labels
A quantised teacher (pip install gguf), in small on a CPU core:
    accelerate launch --cpu recipes/causal_lm.py --config recipes/configs/causal_lm/smollm2.yaml
What the student has to say:
    python -c "from transformers import pipeline; print(pipeline('text-generation', 'runs/causal_lm')('The city'))"

Text is packed into blocks without padding, documents joined by <eos>, so blocks are the same in every epoch and for
every student: what the teacher makes of them is kept in <output_dir>/_teacher_cache, and the teacher runs once.

Bits a byte compare models of different vocabularies: the cross-entropy, in bits, of all tokens of the held-out blocks
but the first of each, divided by the UTF-8 bytes of the text that these tokens stand for. <eos> counts as a token, and
stands for no text. Settings are chosen with --evaluate_on validation and reported with --evaluate_on test.
"""

import logging
import math
import os
from dataclasses import dataclass, field, replace

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_gguf_available

from hf_curriculum_distill import CurriculumDistillationTrainer, layers
from hf_curriculum_distill.config import UNCACHED_METHODS
from hf_curriculum_distill.layers import predicts_next_token, student_size
from hf_curriculum_distill.layers.configurations import student_config
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, RecipeConfig, TextOptions
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.planning import is_hub_name
from hf_curriculum_distill.report.checks import check_embeddings, check_models, check_student_tokenizer
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    check_finite,
    log_progress,
    start_embeddings,
    summarize,
    train_all,
    train_student,
)
from hf_curriculum_distill.tasks.documents import evaluated_blocks, load_documents
from hf_curriculum_distill.tasks.text import check_causal_tokenizer, pack_causal_blocks
from hf_curriculum_distill.teachers import cached
from hf_curriculum_distill.teachers.loading import load_teacher
from hf_curriculum_distill.teachers.pretrained import file_arguments

logger = logging.getLogger("causal_lm")
TASK = "CausalLM"  # for `hf-curriculum-distill plan causal_lm`


@dataclass
class RecipeArguments(TextOptions, ComparisonOptions):
    methods: list[str] = field(default_factory=lambda: ["curriculum"])
    seeds: list[int] | None = None
    student: str = field(
        default="4-192",
        metadata={
            "help": "Student: LAYERS-HIDDEN (a random model of the teacher's family), teacher-LAYERS or "
            "teacher-LAYERS-HIDDEN (made of the teacher's layers), a config.json (a random model), or a model's folder "
            "or OWNER/NAME of the Hub (its weights are the start, and its tokenizer must be the teacher's)."
        },
    )
    teacher: str = "HuggingFaceTB/SmolLM2-135M"
    gguf_file: str | None = field(
        default=None, metadata={"help": "The teacher's GGUF file, in the folder or repository --teacher."}
    )
    block_size: int = 128
    dropout: float = 0.0
    cache_targets: bool = field(
        default=True, metadata={"help": "Whether teacher_cache is <output_dir>/_teacher_cache where it is not set."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("teacher_from", "mlm_probability"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is set, but nothing is masked here, and no teacher is trained; leave it out.")


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults."""

    output_dir: str | None = "runs/causal_lm"
    max_steps: int = 20_000
    per_device_train_batch_size: int = 16
    # an evaluation compares whole logits of both models: 25 MB a block of 128 tokens and 49,152 classes, several times
    per_device_eval_batch_size: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    warmup_steps: float = 0.05
    optim: str = "adamw_torch_fused"
    save_total_limit: int | None = 2
    logging_steps: float = 50


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    log_progress(logger, args)
    log_progress(cached.logger, args)  # how much the cache saves
    if recipe.cache_targets and args.teacher_cache is None and args.method not in UNCACHED_METHODS:
        # Trainer pushes no file whose path begins with an underscore
        args = replace(args, teacher_cache=os.path.join(args.output_dir, "_teacher_cache"))
    runs = planned_or_exit(recipe, args)
    for run in runs:
        check_run(run)
    teacher = find_teacher(recipe, args)
    reference = evaluate_teacher(recipe, args, teacher)
    results = train_all(runs, distil, args)
    if args.should_save:
        print(f"\n{summarize(reference, args, f'{recipe.student} from {recipe.teacher}')}")
    check_finite(results)


def distil(run: Run) -> dict:
    """Train one student; returns its object in results.json."""
    recipe, args = run.recipe, run.args
    tokenizer = find_tokenizer(recipe, args)
    train, heldout = load_data(recipe, args, tokenizer)
    teacher = find_teacher(recipe, args)
    set_seed(args.seed)
    trainer = CurriculumDistillationTrainer(
        model=start_embeddings(make_student(recipe, teacher), teacher, run, tokenizer),
        args=args if (by_name := args.method == "progressive") else replace(args, teacher_model_init_kwargs=None),
        teacher_model=recipe.teacher if by_name else teacher,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    logger.info("%s: %s", args.output_dir, " -> ".join(stage.name for stage in trainer.stages))
    return with_bits_per_byte(train_student(trainer, run.method), heldout)


def evaluate_teacher(recipe: RecipeArguments, args: TrainingConfig, teacher: PreTrainedModel) -> dict:
    """How well the teacher itself predicts the held-out text."""
    _, heldout = load_data(recipe, args, find_tokenizer(recipe, args))
    trainer = CurriculumDistillationTrainer(
        model=teacher,
        args=replace(args, **LABELS_ALONE),
        eval_dataset=heldout,
        data_collator=default_data_collator,
    )
    metrics = trainer.evaluate()
    result = with_bits_per_byte({name: metrics[name] for name in ("eval_loss", "eval_accuracy")}, heldout)
    logger.info(
        "Teacher: %.4f bits a byte, top-1 %.4f on the %s set, %s blocks of %s tokens and %.2f bytes a token",
        result["eval_bits_per_byte"], result["eval_accuracy"], recipe.evaluate_on, len(heldout), recipe.block_size,
        sum(heldout["num_bytes"]) / num_predicted(heldout),
    )  # fmt: skip
    return {"method": "(teacher)"} | result


def with_bits_per_byte(result: dict, heldout: Dataset) -> dict:
    """Add `eval_bits_per_byte` to the metrics of blocks of one length, whose mean loss is that of their tokens."""
    if "eval_loss" not in result:  # not finite
        return result
    bits = result["eval_loss"] / math.log(2) * num_predicted(heldout)
    return result | {"eval_bits_per_byte": bits / sum(heldout["num_bytes"])}


def num_predicted(blocks: Dataset) -> int:
    """The tokens that a causal model predicts: all of a block but its first."""
    return len(blocks) * (len(blocks[0]["input_ids"]) - 1)


# ---- models ----


def check_run(run: Run) -> None:
    """Raise a `ValueError` or `OSError` for models that can't be used, before weights and data are read."""
    recipe = run.recipe
    config = find_teacher_config(recipe, run.args)
    check_embeddings(recipe.student, recipe.student_embeddings, run.args, config)
    heads = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    classes = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    teacher = skeleton(config)
    if not heads.intersection(classes) or not predicts_next_token(teacher):
        raise ValueError(
            f"The teacher {recipe.teacher!r} is a {', '.join(classes)}, without a head that predicts the next token; "
            "use a model of AutoModelForCausalLM."
        )
    student, tokenizer = skeleton(find_student_config(recipe, config)), find_tokenizer(recipe, run.args)
    check_causal_tokenizer(tokenizer)
    check_student_tokenizer(recipe.student, tokenizer)
    check_models(run.args, student, teacher, tokenizer, ("block_size", recipe.block_size))


def find_tokenizer(recipe: RecipeArguments, args: TrainingConfig) -> PreTrainedTokenizerBase:
    if recipe.tokenizer is not None:
        return AutoTokenizer.from_pretrained(recipe.tokenizer)
    where = file_arguments(args.teacher_model_init_kwargs, of_tokenizer=True)
    return AutoTokenizer.from_pretrained(recipe.teacher, **where, **gguf(recipe.gguf_file))


def find_teacher_config(recipe: RecipeArguments, args: TrainingConfig) -> PreTrainedConfig:
    return find_config(recipe.teacher, **file_arguments(args.teacher_model_init_kwargs), **gguf(recipe.gguf_file))


def find_config(name: str, **where: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, **where)
    except OSError as error:
        raise OSError(f"The model {name!r} is not within reach: {str(error).splitlines()[0]}") from error


def gguf(file: str | None) -> dict:
    if file is not None and not is_gguf_available():
        raise ValueError(f"gguf_file is {file!r}, but the package that reads it is missing; pip install gguf.")
    return {} if file is None else {"gguf_file": file}


def find_teacher(recipe: RecipeArguments, args: TrainingConfig) -> PreTrainedModel:
    """The teacher with its weights."""
    student, kwargs = skeleton(find_teacher_config(recipe, args)), args.teacher_model_init_kwargs or {}
    return load_teacher(recipe.teacher, student, args.teacher_dtype, init_kwargs=kwargs | gguf(recipe.gguf_file))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def make_student(recipe: RecipeArguments, teacher: PreTrainedModel) -> PreTrainedModel:
    """A model made of the teacher's layers, a random one by size or of a config.json, or a saved one; in float32."""
    if student_size(recipe.student) is not None:
        return layers.make_student(recipe.student, teacher).float()
    if os.path.isdir(recipe.student) or is_hub_name(recipe.student):
        return AutoModelForCausalLM.from_pretrained(recipe.student, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(find_student_config(recipe, teacher.config), dtype=torch.float32)


def find_student_config(recipe: RecipeArguments, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the student; that of a size is the teacher's, scaled."""
    if os.path.exists(recipe.student) or is_hub_name(recipe.student):
        return find_config(recipe.student)
    if (size := student_size(recipe.student)) is not None:
        return student_config(teacher, size[0], hidden_size=size[1])
    if (size := student_size(f"teacher-{recipe.student}")) is not None:
        config = student_config(teacher, size[0], hidden_size=size[1])
        fields = config.to_dict().items()
        config.update({name: recipe.dropout for name, value in fields if "drop" in name and isinstance(value, float)})
        return config
    raise ValueError(
        f"{recipe.student!r} is no model: use LAYERS-HIDDEN such as 4-192, teacher-LAYERS, teacher-LAYERS-HIDDEN, a "
        "config.json or model folder that exists, or OWNER/NAME of a model on the Hub."
    )


# ---- text ----


def load_data(
    recipe: RecipeArguments, args: TrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Packed blocks to train on and held-out ones; `datasets` keeps them, so that they are made once."""
    with args.main_process_first(desc="data"):
        train, heldout = (
            pack_causal_blocks(
                each, tokenizer, recipe.block_size, recipe.text_column, num_proc=recipe.preprocessing_workers
            )
            for each in load_documents(recipe)
        )
        if not len(train):
            raise ValueError(
                f"The text to train on fills no block of {recipe.block_size} tokens; raise --train_documents."
            )
        return train, evaluated_blocks(heldout, recipe)


if __name__ == "__main__":
    main()
