"""Distil masked images by hidden states; the learning rate is that of a batch of 256, and NumPy draws the masks."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForMaskedImageModeling, HfArgumentParser, set_seed

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_dir: str
    validation_dir: str
    mask_ratio: float = 0.5


@dataclass
class CustomTrainingArguments(CurriculumDistillationConfig):
    base_learning_rate: float = 0.1
    method: str = "hidden"


class MaskGenerator:
    def __init__(self, num_patches, mask_ratio):
        self.num_patches, self.num_masked = num_patches, int(num_patches * mask_ratio)

    def __call__(self):
        mask = np.zeros(self.num_patches, dtype=int)
        mask[np.random.permutation(self.num_patches)[: self.num_masked]] = 1
        return torch.tensor(mask)


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "bool_masked_pos": torch.stack([example["mask"] for example in examples])}


def main():
    script, training_args = HfArgumentParser((ScriptArguments, CustomTrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": f"{script.train_dir}/**", "validation": f"{script.validation_dir}/**"}
    data = load_dataset("imagefolder", data_files=files)
    model = AutoModelForMaskedImageModeling.from_pretrained(script.model_name_or_path)
    image_processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    mask_generator = MaskGenerator((model.config.image_size // model.config.patch_size) ** 2, script.mask_ratio)

    def preprocess_images(examples):
        examples["pixel_values"] = list(image_processor(examples["image"], return_tensors="pt")["pixel_values"])
        examples["mask"] = [mask_generator() for _ in examples["image"]]
        return examples

    for split in ("train", "validation"):
        data[split].set_transform(preprocess_images)
    total = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    training_args.learning_rate = training_args.base_learning_rate * total / 256
    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=image_processor,
        data_collator=collate_fn,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
