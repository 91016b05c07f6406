"""Distil a classifier of recordings, of which training reads a random part of a fixed length."""

import random
import wave
from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_file: str
    validation_file: str
    max_length: int = 400


def read(path):
    with wave.open(path) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16) / 2**15


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    data = load_dataset("csv", data_files={"train": script.train_file, "validation": script.validation_file})
    data = data.class_encode_column("label")
    labels = data["train"].features["label"].names
    feature_extractor = AutoFeatureExtractor.from_pretrained(script.model_name_or_path)
    names = {"label2id": {name: str(i) for i, name in enumerate(labels)}}
    names |= {"id2label": {str(i): name for i, name in enumerate(labels)}}
    config = AutoConfig.from_pretrained(script.model_name_or_path, num_labels=len(labels), **names)
    model = AutoModelForAudioClassification.from_pretrained(script.model_name_or_path, config=config)
    rate = feature_extractor.sampling_rate

    def train_transforms(batch):
        parts = []
        for path in batch["audio"]:
            samples = read(path)
            start = random.randint(0, len(samples) - script.max_length)
            parts.append(samples[start : start + script.max_length])
        inputs = feature_extractor(parts, sampling_rate=rate)
        return {"input_values": inputs["input_values"], "labels": list(batch["label"])}

    def val_transforms(batch):
        inputs = feature_extractor([read(path)[: script.max_length] for path in batch["audio"]], sampling_rate=rate)
        return {"input_values": inputs["input_values"], "labels": list(batch["label"])}

    data["train"].set_transform(train_transforms, output_all_columns=False)
    data["validation"].set_transform(val_transforms, output_all_columns=False)
    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        processing_class=feature_extractor,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
