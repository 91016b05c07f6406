"""Distil multiple choice: four endings of a beginning, of which one is right."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
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


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("csv", data_files={"train": script.train_file, "validation": script.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForMultipleChoice.from_pretrained(script.model_name_or_path)
    endings = [f"ending{number}" for number in range(4)]

    def preprocess(examples):
        first = [context for context in examples["sent1"] for _ in endings]
        second = [
            f"{header} {examples[ending][index]}"
            for index, header in enumerate(examples["sent2"])
            for ending in endings
        ]
        tokens = tokenizer(first, second, truncation=True)
        return {name: [rows[i : i + 4] for i in range(0, len(rows), 4)] for name, rows in tokens.items()}

    data = raw.map(preprocess, batched=True)

    def compute_metrics(eval_predictions):
        predictions, label_ids = eval_predictions
        return {"accuracy": float((predictions.argmax(axis=1) == label_ids).mean())}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForMultipleChoice(tokenizer),
        compute_metrics=compute_metrics,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
