"""Distil a classifier of images in a folder for each class, which are flipped at random when they are read."""

import random
from dataclasses import dataclass

import torch
from datasets import load_dataset
from PIL import ImageOps
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_dir: str
    validation_dir: str


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": f"{script.train_dir}/**", "validation": f"{script.validation_dir}/**"}
    data = load_dataset("imagefolder", data_files=files)
    labels = data["train"].features["label"].names
    names = {"label2id": {name: i for i, name in enumerate(labels)}, "id2label": dict(enumerate(labels))}
    config = AutoConfig.from_pretrained(script.model_name_or_path, num_labels=len(labels), **names)
    model = AutoModelForImageClassification.from_pretrained(script.model_name_or_path, config=config)
    image_processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)

    def pixels(images):
        return list(image_processor(images, return_tensors="pt")["pixel_values"])

    def train_transforms(batch):
        flipped = [ImageOps.mirror(image) if random.random() < 0.5 else image for image in batch["image"]]
        return batch | {"pixel_values": pixels(flipped)}

    data["train"].set_transform(train_transforms)
    data["validation"].set_transform(lambda batch: batch | {"pixel_values": pixels(batch["image"])})
    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        processing_class=image_processor,
        data_collator=collate_fn,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card(finetuned_from=script.model_name_or_path, tasks="image-classification")


if __name__ == "__main__":
    main()
