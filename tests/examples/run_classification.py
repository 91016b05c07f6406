"""Distil a classifier whose texts may have several labels each, written into one column of a CSV file."""

from dataclasses import dataclass

import numpy as np
from datasets import Sequence, Value, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_file: str
    validation_file: str
    max_seq_length: int = 12


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("csv", data_files={"train": script.train_file, "validation": script.validation_file})
    raw = raw.map(lambda row: {"label": (row["label"] or "").split()}, features=None)
    label_list = sorted({label for labels in raw["train"]["label"] for label in labels})
    label_to_id = {label: number for number, label in enumerate(label_list)}
    config = AutoConfig.from_pretrained(script.model_name_or_path, num_labels=len(label_list))
    config.problem_type = "multi_label_classification"
    config.label2id, config.id2label = label_to_id, dict(enumerate(label_list))
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path, config=config)

    def preprocess(examples):
        result = tokenizer(
            examples["sentence"], padding="max_length", max_length=script.max_seq_length, truncation=True
        )
        result["label"] = [[float(label in labels) for label in label_list] for labels in examples["label"]]
        return result

    data = raw.map(preprocess, batched=True, remove_columns=raw["train"].column_names)
    data = data.cast_column("label", Sequence(Value("float32")))

    def compute_metrics(prediction):
        chosen, labels = prediction.predictions > 0, prediction.label_ids > 0
        return {"micro_f1": float(2 * np.sum(chosen & labels) / max(1, np.sum(chosen) + np.sum(labels)))}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
