"""Distil extractive question answering: long contexts become several features, and evaluations put them together."""

from collections import defaultdict
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    EvalPrediction,
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
    max_seq_length: int = 16
    doc_stride: int = 4


class QuestionAnsweringTrainer(CurriculumDistillationTrainer):
    """Computes metrics of answers, which it makes of the logits of all features of an example."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        dataloader = self.get_eval_dataloader(eval_dataset)
        compute_metrics, self.compute_metrics = self.compute_metrics, None  # of answers, not of logits
        try:
            output = self.evaluation_loop(
                dataloader,
                description="Evaluation",
                prediction_loss_only=True if compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self.compute_metrics = compute_metrics
        metrics = dict(output.metrics)
        if self.post_process_function is not None and self.compute_metrics is not None and self.args.should_save:
            answers = self.post_process_function(eval_examples, eval_dataset, output.predictions)
            metrics |= {f"{metric_key_prefix}_{n}": value for n, value in self.compute_metrics(answers).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main():
    script, training_args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForQuestionAnswering.from_pretrained(script.model_name_or_path)

    def tokenize(examples):
        return tokenizer(
            examples["question"],
            examples["context"],
            truncation="only_second",
            max_length=script.max_seq_length,
            stride=script.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )

    def in_context(features, index):
        return [place for place, part in enumerate(features.sequence_ids(index)) if part == 1]

    def prepare_train_features(examples):
        features = tokenize(examples)
        samples, offsets = features.pop("overflow_to_sample_mapping"), features.pop("offset_mapping")
        features["start_positions"], features["end_positions"] = [], []
        for index, spans in enumerate(offsets):
            answer = examples["answers"][samples[index]]
            begin = answer["answer_start"][0]
            end = begin + len(answer["text"][0])
            inside = [p for p in in_context(features, index) if begin <= spans[p][0] and spans[p][1] <= end]
            complete = inside and spans[inside[0]][0] == begin and spans[inside[-1]][1] == end
            features["start_positions"].append(inside[0] if complete else 0)  # 0 is [CLS]: no answer in this feature
            features["end_positions"].append(inside[-1] if complete else 0)
        return features

    def prepare_validation_features(examples):
        features = tokenize(examples)
        samples = features.pop("overflow_to_sample_mapping")
        features["example_id"] = [examples["id"][sample] for sample in samples]
        for index, spans in enumerate(features["offset_mapping"]):
            context = in_context(features, index)
            features["offset_mapping"][index] = [s if place in context else None for place, s in enumerate(spans)]
        return features

    columns = raw["train"].column_names
    train = raw["train"].map(prepare_train_features, batched=True, remove_columns=columns)
    validation = raw["validation"].map(prepare_validation_features, batched=True, remove_columns=columns)

    def post_process(examples, features, predictions):
        best = defaultdict(lambda: (-float("inf"), ""))
        contexts = {example["id"]: example["context"] for example in examples}
        for feature, starts, ends in zip(features, *predictions, strict=True):
            spans, name = feature["offset_mapping"], feature["example_id"]
            for start, first in enumerate(spans):
                for end in range(start, min(start + 4, len(spans))):
                    if first is not None and spans[end] is not None:
                        text = contexts[name][first[0] : spans[end][1]]
                        best[name] = max(best[name], (float(starts[start] + ends[end]), text))
        answers = [{"id": name, "prediction_text": best[name][1]} for name in contexts]
        references = [{"id": example["id"], "answers": example["answers"]} for example in examples]
        return EvalPrediction(predictions=answers, label_ids=references)

    def compute_metrics(prediction):
        pairs = zip(prediction.predictions, prediction.label_ids, strict=True)
        matches = [answer["prediction_text"] in reference["answers"]["text"] for answer, reference in pairs]
        return {"exact_match": 100.0 * sum(matches) / len(matches)}

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        eval_examples=raw["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        post_process_function=post_process,
        compute_metrics=compute_metrics,
        teacher_model=script.teacher_model_name_or_path,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
