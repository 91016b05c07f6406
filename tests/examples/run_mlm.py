"""Distil a masked language model on the lines of a text file, packed into blocks."""

import math
from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_file: str
    validation_file: str
    max_seq_length: int = 16
    mlm_probability: float = 0.3


def main():
    parser = HfArgumentParser((ScriptArguments, CurriculumDistillationConfig))
    script, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(script.model_name_or_path)
    raw = load_dataset("text", data_files={"train": script.train_file, "validation": script.validation_file})

    def group_texts(examples):
        joined = {name: list(chain(*values)) for name, values in examples.items()}
        total = len(joined["input_ids"]) // script.max_seq_length * script.max_seq_length
        starts = range(0, total, script.max_seq_length)
        return {name: [ids[start : start + script.max_seq_length] for start in starts] for name, ids in joined.items()}

    tokens = raw.map(
        lambda examples: tokenizer(examples["text"], return_special_tokens_mask=True),
        batched=True,
        remove_columns=["text"],
    )
    blocks = tokens.map(group_texts, batched=True)

    def preprocess_logits_for_metrics(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def compute_metrics(eval_preds):
        predictions, labels = eval_preds
        return {"masked_accuracy": float((predictions == labels)[labels != -100].mean())}

    trainer = CurriculumDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=script.mlm_probability),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", train_result.metrics | {"train_samples": len(blocks["train"])})
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from=script.model_name_or_path, tasks="fill-mask")


if __name__ == "__main__":
    main()
