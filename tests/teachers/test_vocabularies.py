"""Vocabularies that are padded to different sizes: divergence and evaluation are over the tokenizer's ids."""

import os

import pytest
import torch
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights
from torch.utils.data import default_collate
from transformers import AutoModelForMaskedLM, BertForSequenceClassification, BertTokenizer, GPT2Config, GPT2LMHeadModel

from hf_curriculum_distill import CurriculumDistillationTrainer

KNOWN = 50  # ids that the tokenizer has: those of the examples
LOGITS = [{"kl_weight": 1.0, "label_weight": 0.5}]
ALL = [{"hidden": [[1, 2]], "until": 3}, *LOGITS]


def tokenizer(number=KNOWN):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(number - 5))])})


def models(student_size, teacher_size):
    student = tiny_bert(2, seed=1, vocab_size=student_size)
    return student, tiny_bert(4, width=24, seed=2, initializer_range=0.3, vocab_size=teacher_size)


def make(args, student, teacher, ids=KNOWN, data=None):
    data = masked_lm_examples(16) if data is None else data
    given = {"train_dataset": data, "eval_dataset": data, "teacher_model": teacher}
    return CurriculumDistillationTrainer(student, args, processing_class=tokenizer(ids), **given)


def logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


SIZES = [(50, 56), (64, 52)]


@pytest.mark.parametrize("chunk, cache", [(0, None), (3, None), (3, "whole"), (3, "top")])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_divergence_is_over_the_ids_of_the_tokenizer(config, tmp_path, sizes, chunk, cache):
    k = {None: 64, "whole": None, "top": 8}[cache]
    fields = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_logits": k} if cache else {}
    fields |= {"stages": LOGITS, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 16}
    trainer = make(config(logit_chunk_size=chunk, **fields), *models(*sizes))
    trainer.train()
    batch = default_collate(masked_lm_examples(16))
    labels = batch.pop("labels").flatten()
    with torch.no_grad():
        rows = [m.eval()(**batch).logits.flatten(0, 1)[labels != -100] for m in (trainer.model, trainer.teacher.model)]
    ours, theirs = (logits[:, :KNOWN].double().log_softmax(-1) for logits in rows)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl, rel=1e-4)
    if cache == "top":
        chosen = theirs.topk(8).indices
        p, q = (x.exp().gather(1, chosen) for x in (theirs, ours))
        rest = (1 - p.sum(1)) * ((1 - p.sum(1)) / (1 - q.sum(1))).log()
        kl = ((p * (p / q).log()).sum(1) + rest).mean().item()
    (log,) = logs(trainer)
    assert log["kl"] == pytest.approx(kl, rel=1e-4)
    own = -rows[0].double().log_softmax(-1).gather(1, labels[labels != -100, None]).mean().item()
    assert log["label_loss"] == pytest.approx(own, rel=1e-4)  # the model's own: over all that it has


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_run_is_resumed_to_the_bit_and_keeps_its_padding(config, sizes):
    args = config(stages=ALL, max_steps=6, save_strategy="steps", save_steps=2)
    whole = make(args, *models(*sizes))
    whole.train()
    resumed = make(args, *models(*sizes))
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-4"))
    assert_same_weights(weights(resumed.model), weights(whole.model))
    loaded = AutoModelForMaskedLM.from_pretrained(os.path.join(args.output_dir, "checkpoint-6"))
    assert loaded.config.vocab_size == sizes[0]


def test_decoders_share_a_vocabulary_in_the_same_way(config):
    sizes = {"n_embd": 16, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3}
    student, teacher = (GPT2LMHeadModel(GPT2Config(vocab_size=v, n_layer=n, **sizes)) for v, n in ((50, 2), (64, 4)))
    data = [example | {"labels": example["input_ids"]} for example in masked_lm_examples(16)]
    trainer = make(config(method="one_shot", max_steps=2), student, teacher, data=data)
    trainer.train()
    assert all(log["kl"] > 0 for log in logs(trainer))
    assert trainer.evaluate()["eval_kl"] > 0


def test_classifiers_only_read_the_same_tokens(config):
    student, teacher = (
        tiny_bert(depth, model_class=BertForSequenceClassification, vocab_size=size, num_labels=3)
        for depth, size in ((2, 50), (4, 64))
    )
    data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(masked_lm_examples(16))]
    trainer = make(config(max_steps=4), student, teacher, data=data)
    trainer.train()
    assert trainer.teacher.partial_forward.num_classes is None


@pytest.mark.parametrize("ids", [51, 60, None])
def test_vocabularies_are_refused_unless_both_models_know_all_ids(config, ids):
    student, teacher = models(50, 56)
    with pytest.raises(ValueError, match="vocabulary has 50 entries and the teacher's 56"):
        if ids is None:
            CurriculumDistillationTrainer(student, config(), train_dataset=masked_lm_examples(8), teacher_model=teacher)
        else:
            make(config(), student, teacher, ids)
