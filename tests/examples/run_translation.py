"""Distil a translation model, which generates in evaluations."""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_curriculum_distill import CurriculumDistillationTrainer


@dataclass
class ScriptArguments:
    model_name_or_path: str
    teacher_model_name_or_path: str
    train_file: str
    validation_file: str
    source_lang: str = "en"
    target_lang: str = "tac"
    num_beams: int = 2
    val_max_target_length: int = 8


class DistillationTrainer(CurriculumDistillationTrainer, Seq2SeqTrainer):
    """Both."""


def main():
    script, training_args = HfArgumentParser((ScriptArguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path)

    def preprocess(examples):
        inputs, targets = (
            [pair[language] for pair in examples["translation"]]
            for language in (script.source_lang, script.target_lang)
        )
        return {**tokenizer(inputs), "labels": tokenizer(text_target=targets)["input_ids"]}

    data = raw.map(preprocess, batched=True, remove_columns=raw["train"].column_names)

    def compute_metrics(eval_preds):
        predictions, labels = (np.where(ids == -100, tokenizer.pad_token_id, ids) for ids in eval_preds)
        decoded = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predictions, labels)]
        same = [one.strip() == other.strip() for one, other in zip(*decoded, strict=True)]
        lengths = [np.count_nonzero(row != tokenizer.pad_token_id) for row in predictions]
        return {"exact": float(np.mean(same)), "gen_len": float(np.mean(lengths))}

    training_args.generation_max_length = script.val_max_target_length
    training_args.generation_num_beams = script.num_beams
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100, pad_to_multiple_of=4),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate(max_length=script.val_max_target_length, num_beams=script.num_beams))
    result = trainer.predict(data["validation"], metric_key_prefix="predict", max_length=8, num_beams=script.num_beams)
    texts = np.where(result.predictions == -100, tokenizer.pad_token_id, result.predictions)
    with open(f"{training_args.output_dir}/generated_predictions.txt", "w") as file:
        file.write("\n".join(tokenizer.batch_decode(texts, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
