"""Image classification: a ViT or ResNet that learns from labels, and small students that learn from it.

Scikit-learn's digits, one CPU core, a minute a student:
    pip install scikit-learn
    python recipes/image_classification.py --config recipes/configs/image_classification/digits.yaml
CIFAR-10 of the Hub, one CPU core, an hour; on a GPU, with larger models:
    python recipes/image_classification.py --config recipes/configs/image_classification/cifar10_cpu.yaml
    accelerate launch recipes/image_classification.py --config recipes/configs/image_classification/cifar10.yaml
Then a table and a plot, and how complex what a student learnt from was for it:
    hf-curriculum-distill compare runs/image_classification/digits
    python recipes/image_classification.py --config recipes/configs/image_classification/digits_complexity.yaml
    hf-curriculum-distill complexity runs/image_classification/digits_complexity/progressive

The teacher is trained on the labels, with checkpoints, from which `progressive` and early-stopped teachers are taken;
it is kept for the next launch. An `online` teacher is a new one of the same size. Layers are matched between ViTs; the
stages of a ResNet differ in shape and width, so that it teaches, and learns from, logits alone.
"""

import logging
import math
import os
import re
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ViTConfig,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from hf_curriculum_distill import CurriculumDistillationTrainer, SupervisionComplexityCallback
from hf_curriculum_distill.layers import make_student, student_size
from hf_curriculum_distill.lines import errors_in_one_line
from hf_curriculum_distill.options import ComparisonOptions, RecipeConfig
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.runs import (
    check_kept_teacher,
    compare_methods,
    teacher_arguments,
    train_student,
)
from hf_curriculum_distill.tasks.images import Images, read_images
from hf_curriculum_distill.teachers.checkpoints import find_checkpoints

logger = logging.getLogger("image_classification")

SIZE = re.compile(r"(vit|resnet)-(\d+)-(\d+)")
SIZES = ("hidden_size", "num_hidden_layers", "hidden_sizes", "depths", "image_size", "num_channels")


@dataclass
class RecipeArguments(ComparisonOptions):
    shared_by_runs: ClassVar[frozenset[str]] = frozenset(
        {
            *("dataset", "image_size", "train_images", "heldout_images"),
            *("teacher", "teacher_steps", "teacher_save_steps", "teacher_batch_size"),
        }
    )

    dataset: str = field(
        default="digits",
        metadata={"help": "'digits' (scikit-learn's), or images with labels: files, a folder or a Hub data set."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels of a side, to which images are resized."})
    patch_size: int = field(default=4, metadata={"help": "Pixels of a side of a ViT's patches."})
    train_images: int | None = field(default=None, metadata={"help": "Images to train on, at most; all if none."})
    heldout_images: int | None = field(default=None, metadata={"help": "Images of every evaluation, likewise."})
    teacher: str = field(
        default="runs/image_classification/teacher",
        metadata={"help": "The teacher's folder: used if trained, else written."},
    )
    teacher_from: str = field(
        default="vit-4-64", metadata={"help": "The teacher: vit-LAYERS-HIDDEN or resnet-BLOCKS-CHANNELS."}
    )
    teacher_steps: int = field(default=1000, metadata={"help": "Steps of its training, on the labels."})
    teacher_save_steps: int = field(default=100, metadata={"help": "Steps between its checkpoints."})
    teacher_batch_size: int = field(default=64, metadata={"help": "Images a step of that training."})
    teacher_share: float = field(
        default=1.0,
        metadata={"help": "Share of its training after which the teacher teaches: below 1, an early-stopped teacher."},
    )
    complexity_images: int = field(
        default=0,
        metadata={"help": "Held-out images on which supervision complexity is measured at each evaluation; 0: none."},
    )
    student: str = field(
        default="vit-2-32",
        metadata={
            "help": "Student: vit-LAYERS-HIDDEN, resnet-BLOCKS-CHANNELS (three stages of that many basic blocks, the "
            "first of that many channels), teacher-LAYERS (that many of a ViT's blocks, evenly spread) or "
            "teacher-LAYERS-HIDDEN (its family in another width, randomly initialised)."
        },
    )

    def __post_init__(self):
        for name, size in {"student": self.student, "teacher_from": self.teacher_from}.items():
            if not (SIZE.fullmatch(size) or (name == "student" and student_size(size))):
                raise ValueError(f"{name} is {size!r}; use vit-LAYERS-HIDDEN or resnet-BLOCKS-CHANNELS.")
        if not 0 < self.teacher_share <= 1:
            raise ValueError(f"teacher_share is {self.teacher_share}; it is a share of a training, above 0, at most 1.")


@dataclass
class TrainingConfig(RecipeConfig):
    """The recipes' configuration with this job's defaults."""

    output_dir: str | None = "runs/image_classification/run"
    max_steps: int = 1000
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 256
    learning_rate: float = 1e-3
    teacher_learning_rate: float | None = 1e-3
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    save_only_model: bool = True
    disable_tqdm: bool | None = True


@errors_in_one_line()
def main():
    recipe, args = parse_arguments([RecipeArguments, TrainingConfig], description=__doc__.split("\n")[0])
    planned_or_exit(recipe, args)
    data = Data(recipe)
    summary = compare_methods(
        recipe,
        args,
        lambda recipe, args: find_teacher(recipe, args, data),
        lambda run, checkpoints: distil(run, checkpoints, data),
        logger,
    )
    if args.should_save:
        print(f"\n{summary}")


class Data:
    """The images, read once, and what models have to know of them."""

    def __init__(self, recipe: RecipeArguments):
        sizes = recipe.image_size, recipe.train_images, recipe.heldout_images
        self.train, self.heldout, self.names = read_images(recipe.dataset, *sizes)
        self.num_channels, self.image_size = self.train.pixels.shape[1:3]

    def datasets(self) -> dict[str, Images]:
        return {"train_dataset": self.train, "eval_dataset": self.heldout}


def distil(run: Run, checkpoints: list[str], data: Data) -> dict:
    """Train one student."""
    recipe, args = run.recipe, run.args
    teacher = checkpoints[math.ceil(recipe.teacher_share * len(checkpoints)) - 1]
    set_seed(args.seed)
    if student_size(recipe.student):
        student = make_student(recipe.student, AutoModelForImageClassification.from_pretrained(teacher))
    else:
        student = make_model(recipe.student, recipe, data)
    if args.method == "progressive":
        teacher = checkpoints
    elif args.method == "online":
        teacher = make_model(recipe.teacher_from, recipe, data)
    trainer = CurriculumDistillationTrainer(model=student, args=args, teacher_model=teacher, **data.datasets())
    trainer.remove_callback(PrinterCallback)
    if recipe.complexity_images:
        trainer.add_callback(SupervisionComplexityCallback(trainer, recipe.complexity_images))
    return train_student(trainer, run.method)


def find_teacher(recipe: RecipeArguments, args: TrainingConfig, data: Data) -> list[str]:
    """The teacher's checkpoints, in the order of its training, which is done if it is not there yet."""
    if not os.path.isfile(os.path.join(recipe.teacher, TRAINER_STATE_NAME)):
        train_teacher(recipe, args, data)
    checkpoints = find_checkpoints(recipe.teacher)
    wanted, model = model_config(recipe.teacher_from, recipe, data), load(checkpoints[-1])
    facts = {name: (getattr(model.config, name, None), getattr(wanted, name, None)) for name in SIZES}
    check_kept_teacher(recipe.teacher, facts)
    args = teacher_arguments(args, recipe.teacher, 1, 1, 1)
    accuracy = CurriculumDistillationTrainer(model=model, args=args, **data.datasets()).evaluate()["eval_accuracy"]
    logger.info("%s: accuracy %.4f on %d held-out images", recipe.teacher, accuracy, len(data.heldout))
    return checkpoints


def train_teacher(recipe: RecipeArguments, args: TrainingConfig, data: Data) -> None:
    logger.info("%s: training a teacher on the labels", recipe.teacher)
    steps, every = recipe.teacher_steps, recipe.teacher_save_steps
    args = teacher_arguments(args, recipe.teacher, steps, recipe.teacher_batch_size, min(every, steps), method="labels")
    set_seed(args.seed)
    model = make_model(recipe.teacher_from, recipe, data)
    trainer = CurriculumDistillationTrainer(model=model, args=args, **data.datasets())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_state()


def load(folder: str) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder)


def make_model(size: str, recipe: RecipeArguments, data: Data) -> PreTrainedModel:
    return AutoModelForImageClassification.from_config(model_config(size, recipe, data))


def model_config(size: str, recipe: RecipeArguments, data: Data) -> PreTrainedConfig:
    """The configuration that `vit-LAYERS-HIDDEN` or `resnet-BLOCKS-CHANNELS` stands for."""
    kind, *numbers = SIZE.fullmatch(size).groups()
    depth, width = map(int, numbers)
    names = dict(enumerate(data.names))
    shared = {"num_channels": data.num_channels, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    if kind == "resnet":
        return ResNetConfig(
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[depth] * 3,
            layer_type="basic",
            **shared,
        )
    return ViTConfig(
        image_size=data.image_size,
        patch_size=recipe.patch_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 16),
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shared,
    )


if __name__ == "__main__":
    main()
