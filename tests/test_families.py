"""Every architecture through the trainer, and teachers and students of different families."""

import copy

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, VOCAB_SIZE, build
from conftest import assert_same_weights, weights
from layers.test_forward import blocks_of, same_randomness
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_curriculum_distill import CurriculumDistillationTrainer


def examples(batch, count):
    """So many examples like the batch's first, with labels: the tokens themselves, the decoder's, or classes."""
    data = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        example = {}
        for name, tensor in batch.items():
            shape = (8,) if name in ("input_ids", "attention_mask") else tensor.shape[1:]
            if name in ("input_ids", "decoder_input_ids"):
                example[name] = torch.randint(3, VOCAB_SIZE, shape, generator=generator)
            elif name == "attention_mask":
                example[name] = (torch.arange(*shape) < shape[0] - index % 3).long()
            else:
                example[name] = torch.randn(shape, generator=generator)
        data.append(example)
    return data


def labelled(model, data):
    for index, example in enumerate(data):
        if "Classification" in type(model).__name__ and "Token" not in type(model).__name__:
            example["labels"] = torch.tensor(index % model.config.num_labels)
            continue
        tokens = example.get("decoder_input_ids", example.get("input_ids"))
        labelled = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(index)) < 0.5
        labelled[1] = True
        if "attention_mask" in example and "decoder_input_ids" not in example:
            labelled &= example["attention_mask"].bool()
        num_classes = model.config.num_labels if "TokenClassification" in type(model).__name__ else VOCAB_SIZE
        example["labels"] = torch.where(labelled, tokens % num_classes, -100)
    return data


class Watch(TrainerCallback):
    """Weights, and which parameters have optimizer state, after each step."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        stateful = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
        self.steps.append((weights(model), stateful))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = [(weights(model), set())]


class SameDraws(CurriculumDistillationTrainer):
    """Dropout draws the same numbers in a step however many blocks ran in the steps before."""

    def training_step(self, *args):
        same_randomness()
        return super().training_step(*args)


def train(trainer_class, student, teacher, args, data):
    watch = Watch()
    trainer = trainer_class(student, args, train_dataset=data, teacher_model=teacher, callbacks=[watch])
    trainer.train()
    return trainer, watch.steps


def losses(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_through_all_stages_and_truncation_changes_only_the_cost(config, name):
    stages = [{"hidden": [[1, 2]], "until": 1}, {"hidden": [[2, 3]], "until": 2}, {"kl_weight": 1.0}]
    runs = []
    for truncate in (True, False):
        student, block, batch = build(name, seed=1)
        data = labelled(student, examples(batch, 8))
        args = config(
            f"{truncate}",
            stages=stages,
            max_steps=3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            weight_decay=0.1,
            truncate=truncate,
        )
        trainer, steps = train(SameDraws, student, build(name, seed=2)[0], args, data)
        runs.append((trainer, steps))
    (truncated, steps), (whole, whole_steps) = runs
    assert [log["stage"] for log in truncated.state.log_history if "loss" in log] == [0, 1, 2]
    assert losses(truncated) == losses(whole)
    for (actual, _), (expected, _) in zip(steps, whole_steps, strict=True):
        assert_same_weights(actual, expected)

    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for layer, step in ((1, 1), (2, 2)):
        beyond = {names[id(p)] for b in blocks_of(student, block)[layer:] for p in b.parameters() if id(p) in names}
        beyond -= {names[id(p)] for b in blocks_of(student, block)[:layer] for p in b.parameters()}  # shared biases
        assert beyond
        assert not beyond & steps[step][1]
        assert all(torch.equal(steps[step][0][name], steps[0][0][name]) for name in beyond)
        assert steps[step][1]  # while what is below has been trained
        assert any(not torch.equal(steps[step][0][name], steps[0][0][name]) for name in steps[step][1])


def test_a_parameter_that_is_a_modules_input_does_not_disturb_the_count_of_operations(config):
    changes = {"hidden_dropout_prob": 0.0, "norm_rel_ebd": "none"}  # position embeddings enter projections as they are
    student, teacher = model("deberta-v2", 1, **changes), model("deberta-v2", 2)
    args = config(stages=[{"hidden": [[1, 1]]}], max_steps=1)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, text())
    assert trainer.state.log_history[0]["student_flops"] > trainer.state.log_history[0]["teacher_flops"] > 0


# ---- families ----


def text(count=16, token_types=True):
    data = examples({"input_ids": torch.zeros(1, 8), "attention_mask": torch.zeros(1, 8)}, count)
    if token_types:
        for index, example in enumerate(data):
            example["token_type_ids"] = (torch.arange(8) > 2 + index % 4).long()
    return data


def images():
    return examples({"pixel_values": torch.zeros(1, 3, 16, 16)}, 16)


def sounds():
    return examples({"input_values": torch.zeros(1, 400)}, 16)


def model(name, seed, **changes):
    model_class, config, _, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    return model_class(type(config)(**config.to_dict() | changes))


# teacher, student, data; vocabularies agree
FAMILIES = {
    "bert -> modernbert": ("bert", "modernbert", text),
    "bert -> distilbert": ("bert", "distilbert", text),
    "roberta -> camembert": ("roberta", "camembert", lambda: text(token_types=False)),
    "modernbert -> deberta-v2": ("modernbert", "deberta-v2", text),
    "gpt2 -> llama": ("gpt2", "llama", lambda: text(token_types=False)),
    "llama -> mamba2": ("llama", "mamba2", lambda: text(token_types=False)),
    "vit -> dinov2": ("vit", "dinov2", images),
    "hubert -> wav2vec2": ("hubert", "wav2vec2", sounds),
}


@pytest.mark.parametrize("pair", FAMILIES)
def test_one_family_teaches_another(config, pair):
    teacher_name, student_name, data = FAMILIES[pair]
    teacher = model(teacher_name, seed=2)
    student = model(student_name, seed=1)
    stages = [{"hidden": [[1, 1]], "until": 20}, {"hidden": [[3, 3]], "until": 40}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=44, per_device_train_batch_size=8, learning_rate=5e-3)
    data = labelled(student, data())
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=data, eval_dataset=data[:4], teacher_model=teacher
    )
    trainer.train()
    errors = torch.tensor(losses(trainer, "hidden_mse"))
    for stage in errors.view(2, 20):
        assert stage[-4:].mean() < 0.8 * stage[:4].mean()
    assert trainer.evaluate()["eval_agreement"] >= 0


def albert(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 36}
    return hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=VOCAB_SIZE, embedding_size=16, **sizes))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_shares_its_blocks_learns_and_teaches(config, who):
    student, teacher = (albert(1), model("bert", 2)) if who == "student" else (model("bert", 1), albert(2))
    stages = [{"hidden": [[1, 1]], "until": 20}, {"hidden": [[3, 3]], "until": 40}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=44, per_device_train_batch_size=8, learning_rate=5e-3)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, labelled(student, text()))
    for stage in torch.tensor(losses(trainer, "hidden_mse")).view(2, 20):
        assert stage[-4:].mean() < 0.8 * stage[:4].mean()


@pytest.mark.parametrize(
    "fields", [{"train_prefix": "block"}, {"freeze_matched_layers": True}, {"finished_layer_rate": 0.5}], ids=str
)
def test_layers_of_a_shared_block_are_not_frozen_apart(config, fields):
    with pytest.raises(ValueError, match="AlbertForMaskedLM runs one block for many layers"):
        CurriculumDistillationTrainer(albert(1), config(**fields), train_dataset=text(), teacher_model=model("bert", 2))


def test_a_student_that_leaves_blocks_out_is_refused_and_such_a_teacher_is_not(config):
    dropping, whole = model("hubert", 1, layerdrop=0.1), model("wav2vec2", 2)
    data = labelled(whole, sounds())
    with pytest.raises(ValueError, match=r"The student's layerdrop is 0\.1"):
        CurriculumDistillationTrainer(dropping, config(), train_dataset=data, teacher_model=whole)
    CurriculumDistillationTrainer(dropping, config(method="one_shot"), train_dataset=data, teacher_model=whole)
    trainer, _ = train(CurriculumDistillationTrainer, model("wav2vec2", 2), dropping, config(), data)
    assert len(losses(trainer)) == 8


@pytest.mark.parametrize(
    "teacher, shapes", [("deit", r"\(2, 5, 32\).*\(2, 6, 32\)"), ("siglip", r"\(2, 5, 32\).*\(2, 4, 32\)")]
)
def test_another_number_of_positions_is_an_error_that_names_both(config, teacher, shapes):
    student, teacher = model("vit", 1), model(teacher, 2)  # one class token and four patches; two, none
    data = labelled(student, images())
    with pytest.raises(ValueError, match=shapes):
        train(CurriculumDistillationTrainer, student, teacher, config(), data)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, config(method="one_shot"), data)
    assert len(losses(trainer)) == 8  # logits need no positions


# ---- heads with rules of their own ----


def llama_like(model_class, config_class, depth, seed, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return model_class(config_class(num_hidden_layers=depth, intermediate_size=32, **sizes | config))


def mixtral(depth, seed, **config):
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return llama_like(hf.MixtralForCausalLM, hf.MixtralConfig, depth, seed, **experts | config)


def causal_text(count=8):
    data = text(count, token_types=False)
    for example in data:
        example["labels"] = example["input_ids"].where(example["attention_mask"].bool(), -100)
    return data


@pytest.mark.parametrize("fields", [{}, {"label_loss_weight": 0.5, "method": "one_shot"}], ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_a_mixture_of_experts_learns_its_labels_with_its_routers_auxiliary_loss(config, fields, wide):
    student, teacher = mixtral(2, 1), llama_like(hf.LlamaForCausalLM, hf.LlamaConfig, 4, 2)
    data = causal_text()
    with torch.no_grad():
        own = student(**hf.default_data_collator(data))
    args = config(
        **{"method": "labels"} | fields,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=8 if wide else 4,
        gradient_accumulation_steps=1 if wide else 2,
    )
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher_model=teacher)
    trainer.train()
    log = trainer.state.log_history[0]
    labels = log["label_loss"] + log["aux_loss"]
    weight = fields.get("label_loss_weight", 1.0)
    assert log["loss"] == pytest.approx(weight * labels + log.get("kl", 0.0), rel=1e-5)
    assert log["label_loss"] == pytest.approx((own.loss - 0.5 * own.aux_loss).item(), rel=1e-5)
    if wide:  # how evenly experts are chosen is no sum over examples
        assert log["aux_loss"] == pytest.approx(0.5 * own.aux_loss.item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own.loss.item(), rel=1e-5)


def test_an_online_mixture_of_experts_learns_with_it_too(config):
    student, teacher, data = llama_like(hf.LlamaForCausalLM, hf.LlamaConfig, 2, 1), mixtral(4, 2), causal_text()
    with torch.no_grad():
        own = teacher(**hf.default_data_collator(data)).loss.item()
    args = config(method="online", max_steps=1, per_device_train_batch_size=8)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, data)
    assert trainer.state.log_history[0]["teacher_loss"] == pytest.approx(own, rel=1e-5)


def test_without_router_logits_there_is_no_auxiliary_loss(config):
    student, teacher = mixtral(2, 1, output_router_logits=False), mixtral(4, 2)
    args = config(method="labels", max_steps=1)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, causal_text())
    assert "aux_loss" not in trainer.state.log_history[0]


def ctc(depth, seed):
    torch.manual_seed(seed)
    _, made, _, _ = ARCHITECTURES["wav2vec2"]
    still = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    changes = dict.fromkeys(still, 0.0) | {"num_hidden_layers": depth, "pad_token_id": 0}
    return hf.Wav2Vec2ForCTC(type(made)(**made.to_dict() | changes))


@pytest.mark.parametrize("padded", [True, False])
def test_ctc_is_matched_on_every_frame_that_is_not_padding(config, padded):
    student, teacher = ctc(3, 1), ctc(4, 2)
    data = []
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        transcript = torch.randint(1, 40, (5,), generator=generator)
        data.append({"input_values": torch.randn(800, generator=generator), "labels": transcript})
        if padded:
            data[-1]["attention_mask"] = (torch.arange(800) < 800 - 150 * index).long()
    batch, kls = hf.default_data_collator(data), []
    with torch.no_grad():
        loss, ours, theirs = student.eval()(**batch).loss, student(**batch).logits, teacher.eval()(**batch).logits
    for index in range(4):
        samples = 800 - 150 * index if padded else 800
        frames = ((samples - 10) // 5 + 1 - 8) // 4 + 1  # of two convolutions
        ours_, theirs_ = ours[index, :frames].log_softmax(-1), theirs[index, :frames].log_softmax(-1)
        kls.append((theirs_.exp() * (theirs_ - ours_)).sum(-1))
    expected = torch.cat(kls).mean().item()
    stages = [{"hidden": [[1, 1]], "until": 1}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=2, learning_rate=0.0)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher_model=teacher)
    trainer.train()
    assert losses(trainer, "kl") == pytest.approx([expected], rel=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["eval_kl"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= metrics["eval_agreement"] <= 1
    assert "eval_accuracy" not in metrics  # no label belongs to a frame


def test_ctc_learns_from_no_labels_of_frames(config):
    with pytest.raises(ValueError, match="'kl \\+ labels' learns from labels, but the transcripts of Wav2Vec2ForCTC"):
        CurriculumDistillationTrainer(ctc(3, 1), config(label_loss_weight=1.0), teacher_model=ctc(4, 2))


@pytest.mark.parametrize("name, shifts", [("internvl", True), ("bart", False), ("trocr", False), ("llama", True)])
def test_a_decoders_labels_are_where_its_own_loss_has_them(config, name, shifts):
    tiny = {"vocab_size": VOCAB_SIZE, "d_model": 32, "decoder_attention_heads": 2, "decoder_ffn_dim": 36}
    text_config = {"model_type": "qwen2", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 36}
    text_config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": [16, 16], "patch_size": [8, 8]}
    make = {
        "internvl": lambda depth: hf.InternVLForConditionalGeneration(
            hf.InternVLConfig(
                vision_config=vision, text_config=text_config | {"num_hidden_layers": depth}, image_token_id=98
            )
        ),
        "bart": lambda depth: hf.BartForCausalLM(hf.BartConfig(decoder_layers=depth, dropout=0.0, **tiny)),
        "trocr": lambda depth: hf.TrOCRForCausalLM(hf.TrOCRConfig(decoder_layers=depth, dropout=0.0, **tiny)),
        "llama": lambda depth: llama_like(hf.LlamaForCausalLM, hf.LlamaConfig, depth, depth),
    }[name]
    student, teacher, data = make(2), make(3), causal_text()
    batch = hf.default_data_collator(data)
    with torch.no_grad():
        own = student.eval()(**batch)
    counted = (batch["labels"][:, 1:] if shifts else batch["labels"]) != -100
    rows = own.logits[:, :-1][counted] if shifts else own.logits[counted]
    labels = batch["labels"][:, 1:][counted] if shifts else batch["labels"][counted]
    args = config(method="one_shot", label_loss_weight=1.0, max_steps=1, learning_rate=0.0)
    args.per_device_train_batch_size = 8
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher_model=teacher)
    trainer.train()
    assert losses(trainer, "label_loss") == pytest.approx([own.loss.item()], rel=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(own.loss.item(), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx((rows.argmax(-1) == labels).float().mean().item())


# ---- encoder-decoders whose collators give labels alone ----

IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}


def pairs(name, depth, seed=0):
    torch.manual_seed(seed)
    bart = {name: ARCHITECTURES["bart"][1].to_dict()[name] for name in ("vocab_size", "d_model", "encoder_ffn_dim")}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 36, **IDS, "dropout": 0.0}
    bart |= {"encoder_layers": depth, "decoder_layers": depth, "max_position_embeddings": 40}
    drops = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    speech = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    t5 = {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": depth, "num_heads": 2, "d_kv": 16, "d_ff": 36, **IDS}
    return {
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
        "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**bart, **drops)),
        "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**bart | speech)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, dropout_rate=0.0)),
        "bart-classifier": lambda: hf.BartForSequenceClassification(hf.BartConfig(**bart, num_labels=3)),
        "t5-classifier": lambda: hf.T5ForSequenceClassification(hf.T5Config(**t5, num_labels=3, dropout_rate=0.0)),
        "t5-tagger": lambda: hf.T5ForTokenClassification(hf.T5Config(**t5, num_labels=3, dropout_rate=0.0)),
    }[name]()


def labels_alone(name, count=8):
    data = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB_SIZE, (6,), generator=generator)
        ids[-1] = 2
        example = {"input_ids": ids, "attention_mask": (torch.arange(6) < 6 - index % 2).long()}
        if name == "whisper":
            example = {"input_features": torch.randn(8, 40, generator=generator)}
            example["attention_mask"] = (torch.arange(40) < 40 - 10 * (index % 2)).long()
        labels = ids.where(torch.arange(6) < 6 - index % 3, -100)
        if name.endswith("classifier"):
            labels = torch.tensor(index % 3)
        elif name.endswith("tagger"):
            labels = (labels % 3).where(labels != -100, -100)
        data.append(example | {"labels": labels})
    return data


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["bart", "m2m100", "whisper", "t5", "bart-classifier", "t5-classifier", "t5-tagger"])
def test_an_encoder_decoder_is_given_labels_alone_and_learns_by_its_own_loss(config, name, stack):
    student, teacher, data = pairs(name, 1, seed=1), pairs(name, 2, seed=2), labels_alone(name)
    if name == "t5-tagger" and stack == "decoder":
        return  # it has an encoder only
    with torch.no_grad():
        own = student.eval()(**hf.default_data_collator(data)).loss.item()
    stages = [{"hidden": [[1, 2]], "until": 1}, {"kl_weight": 1.0, "label_weight": 1.0}]
    if stack == "decoder" and "classifier" in name:
        stages[0]["hidden"] = [[0, 0]]  # its positions are those of the input
    args = config(stages=stages, max_steps=2, layer_stack=stack, learning_rate=0.0, per_device_train_batch_size=8)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, eval_dataset=data, teacher_model=teacher)
    trainer.train()
    assert losses(trainer, "label_loss") == pytest.approx([own], rel=1e-4)
    assert len(losses(trainer, "hidden_mse")) == 1
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(own, rel=1e-4)
    assert {"eval_accuracy", "eval_agreement", "eval_kl"} <= metrics.keys()


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_a_decoders_states_are_matched_where_its_labels_count(config, name):
    student, teacher, data = pairs(name, 2, seed=1), pairs(name, 3, seed=2), labels_alone(name)
    reference, batch = copy.deepcopy(student), hf.default_data_collator(data)
    args = config(stages=[{"hidden": [[1, 2]]}], max_steps=1, layer_stack="decoder", learning_rate=0.1, optim="sgd")
    args.per_device_train_batch_size, args.max_grad_norm = 8, 0.0
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, teacher_model=teacher)
    before = weights(student)
    trainer.train()
    shifted = batch["labels"].roll(1, 1)
    shifted[:, 0] = 2
    inputs = {n: v for n, v in batch.items() if n != "labels"} | {"decoder_input_ids": shifted.where(shifted >= 0, 1)}
    states = []
    for model, layer in ((reference, 1), (teacher, 2)):
        blocks = [b for b in model.get_decoder().modules() if isinstance(b, GradientCheckpointingLayer)]
        hook = blocks[layer - 1].register_forward_hook(lambda _, args, out: states.append(out))
        model(**inputs)
        hook.remove()
    ours, theirs = (out if isinstance(out, torch.Tensor) else out[0] for out in states)
    errors = (ours - trainer.projection_bank.project(1, theirs.detach())).square().mean(-1)
    loss = errors[batch["labels"] != -100].mean()
    assert losses(trainer, "hidden_mse") == pytest.approx([loss.item()], rel=1e-4)
    loss.backward()
    for name_, parameter in reference.named_parameters():
        step = 0.0 if parameter.grad is None else 0.1 * parameter.grad
        torch.testing.assert_close(student.state_dict()[name_], before[name_] - step, rtol=1e-4, atol=1e-5)
