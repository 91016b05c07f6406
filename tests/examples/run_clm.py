"""Distil a causal language model on the lines of a text file, packed into blocks; arguments from a JSON file, too."""

import os
import sys
from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
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
    block_size: int = 16


def main():
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        script, training_args = parser.parse_json_file(os.path.abspath(sys.argv[1]))
    else:
        script, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path)
    raw = load_dataset("text", data_files={"train": script.train_file, "validation": script.validation_file})
    tokens = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])

    def group_texts(examples):
        joined = {name: list(chain(*values)) for name, values in examples.items()}
        total = len(joined["input_ids"]) // script.block_size * script.block_size
        starts = range(0, total, script.block_size)
        result = {name: [ids[start : start + script.block_size] for start in starts] for name, ids in joined.items()}
        return result | {"labels": result["input_ids"].copy()}

    blocks = tokens.map(group_texts, batched=True)

    def compute_metrics(eval_preds):
        predictions, labels = eval_preds  # the labels are shifted here, after the argmax below
        return {"next_token_accuracy": float((labels[:, 1:] == predictions[:, :-1]).mean())}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
