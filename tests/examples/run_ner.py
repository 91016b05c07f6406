"""Distil a tagger of tokens: the first token of a word has the word's label, the others have none."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
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
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    label_list = sorted({label for labels in raw["train"]["ner_tags"] for label in labels})
    label_to_id = {label: number for number, label in enumerate(label_list)}
    config = AutoConfig.from_pretrained(script.model_name_or_path, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForTokenClassification.from_pretrained(script.model_name_or_path, config=config)
    model.config.label2id, model.config.id2label = label_to_id, dict(enumerate(label_list))

    def tokenize_and_align_labels(examples):
        inputs = tokenizer(examples["tokens"], truncation=True, is_split_into_words=True)
        inputs["labels"] = []
        for index, tags in enumerate(examples["ner_tags"]):
            words = inputs.word_ids(batch_index=index)
            first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
            labels = [label_to_id[tags[w]] if is_first else -100 for w, is_first in zip(words, first, strict=True)]
            inputs["labels"].append(labels)
        return inputs

    data = raw.map(tokenize_and_align_labels, batched=True)

    def compute_metrics(prediction):
        predictions, labels = prediction
        return {"tag_accuracy": float((predictions.argmax(2) == labels)[labels != -100].mean())}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    _, _, metrics = trainer.predict(data["validation"], metric_key_prefix="predict")
    trainer.save_metrics("predict", metrics)


if __name__ == "__main__":
    main()
