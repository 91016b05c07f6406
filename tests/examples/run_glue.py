"""Distil a classifier of sentence pairs, or a regression, on CSV files whose labels are numbers, names or floats."""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
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
    test_file: str
    max_seq_length: int = 24


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": script.train_file, "validation": script.validation_file, "test": script.test_file}
    raw = load_dataset("csv", data_files=files)
    is_regression = raw["train"].features["label"].dtype in ("float32", "float64")
    label_list = None if is_regression else sorted(raw["train"].unique("label"))
    config = AutoConfig.from_pretrained(
        script.model_name_or_path, num_labels=1 if is_regression else len(label_list), finetuning_task="csv"
    )
    if not is_regression:
        label_to_id = {label: number for number, label in enumerate(label_list)}
        config.label2id = label_to_id
        config.id2label = {number: label for label, number in label_to_id.items()}
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path, config=config)

    def preprocess(examples):
        texts = examples["sentence1"], examples["sentence2"]
        result = tokenizer(*texts, padding=False, max_length=script.max_seq_length, truncation=True)
        result["labels"] = [label if is_regression else label_to_id[label] for label in examples["label"]]
        return result

    data = raw.map(preprocess, batched=True, remove_columns=raw["train"].column_names)

    def compute_metrics(prediction):
        predictions = prediction.predictions
        predictions = predictions[0] if isinstance(predictions, tuple) else predictions
        if is_regression:
            return {"mse": float(((np.squeeze(predictions) - prediction.label_ids) ** 2).mean())}
        return {"accuracy": float((predictions.argmax(1) == prediction.label_ids).mean())}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate(eval_dataset=data["validation"]))
    predictions = trainer.predict(data["test"].remove_columns("labels"), metric_key_prefix="predict").predictions
    with open(f"{training_args.output_dir}/predict_results.txt", "w") as file:
        for row in predictions:
            file.write(f"{float(row[0]):.6f}\n" if is_regression else f"{label_list[row.argmax()]}\n")


if __name__ == "__main__":
    main()
