"""What cannot work is found before it is tried: launches, stages, caches and data sets."""

import pytest
import transformers as hf
from conftest import STUDENT_DEPTH, TEACHER_DEPTH, VOCAB_SIZE
from transformers import BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.preparing.checks import (
    check_blocks,
    check_cache,
    check_launch,
    check_stages,
    check_training_data,
)


def make(student, teacher, args, data):
    return CurriculumDistillationTrainer(student, args, train_dataset=data, teacher_model=teacher)


# ---- launches ----


@pytest.mark.parametrize("rate, saved, warned", [(5e-5, False, True), (5e-5, True, False), (1e-3, False, False)])
def test_the_rate_of_fine_tuning_is_named_iff_the_student_was_read_from_no_folder(
    config, student, teacher, examples, tmp_path, caplog, rate, saved, warned
):
    if saved:
        student.save_pretrained(tmp_path / "student")
        student = type(student).from_pretrained(tmp_path / "student")
    trainer = CurriculumDistillationTrainer(
        student, config(learning_rate=rate, max_steps=6), train_dataset=examples, teacher_model=teacher
    )
    trainer.train()
    assert ("learning_rate is 5e-05, the default of TrainingArguments" in caplog.text) == warned


LAUNCHES = {
    "another name for labels": ({"label_names": ["tags"]}, r"label_names is \['tags'\], but losses are computed from"),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "gradient_checkpointing_kwargs has use_reentrant=True",
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_arguments_of_trainer_with_which_losses_would_be_wrong_are_refused(config, name):
    fields, message = LAUNCHES[name]
    with pytest.raises(ValueError, match=message):
        check_launch(config(**fields), None)


def test_a_loss_function_of_ones_own_is_refused(config):
    with pytest.raises(ValueError, match="compute_loss_func was given together with teacher_model or stages"):
        check_launch(config(), lambda *args: 0)


def test_chunks_of_logits_are_refused_only_where_parameters_are_sharded(config):
    check_launch(config(logit_chunk_size=7), None)
    check_launch(config(logit_chunk_size=0), None, shards_parameters=True)
    with pytest.raises(ValueError, match="logit_chunk_size is 7, but FSDP and DeepSpeed need all logits at once"):
        check_launch(config(logit_chunk_size=7), None, shards_parameters=True)


def test_rates_of_layers_need_parameters_that_are_whole(config):
    check_launch(config(finished_layer_rate=0.5), None)
    with pytest.raises(ValueError, match=r"finished_layer_rate is 0\.5, .* but FSDP and DeepSpeed shard them; launch"):
        check_launch(config(finished_layer_rate=0.5), None, shards_parameters=True)


def test_an_order_that_is_measured_needs_parameters_that_are_whole(config):
    measured = {"layer_order": "complexity"}
    check_launch(config(**measured), None)
    with pytest.raises(ValueError, match=r"layer_order='complexity' needs all gradients .*, but FSDP and DeepSpeed"):
        check_launch(config(**measured), None, shards_parameters=True)
    for unused in ({"method": "one_shot"}, {"stages": [{"kl_weight": 1.0}]}):
        check_launch(config(**measured, **unused), None, shards_parameters=True)


def test_several_gpus_in_one_process_are_refused(config):
    args = config()
    check_launch(args, None)
    args._n_gpu = 2  # as on a machine that has them, without a launcher
    with pytest.raises(ValueError, match=r"2 GPUs in one process would run as nn\.DataParallel"):
        check_launch(args, None)


def test_what_can_be_launched_is(config):
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    check_launch(config(**fields, label_names=["labels", "tags"]), None)


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_student_whose_parts_are_on_several_devices_is_refused(config, student, teacher, examples, tmp_path, rest):
    student.save_pretrained(tmp_path / "student")
    places = {"bert.embeddings": "cpu", "bert.encoder": rest, "cls": "cpu"}
    student = hf.BertForMaskedLM.from_pretrained(tmp_path / "student", device_map=places, offload_folder=tmp_path)
    if rest == "cpu":  # on one device
        make(student, teacher, config(), examples)
        return
    with pytest.raises(ValueError, match="The student's device_map spreads it over cpu, disk, but each process runs"):
        make(student, teacher, config(), examples)


# ---- stages ----


def check(args, model, deepspeed=False):
    check_stages(args.resolve_stages(STUDENT_DEPTH, TEACHER_DEPTH), args, PartialForward(model), deepspeed)


def test_a_student_without_a_head_trains_in_layer_stages_alone(config, student):
    headless = BertModel(student.config, add_pooling_layer=False)
    check(config(stages=[{"hidden": [[1, 2]]}]), headless)
    with pytest.raises(ValueError, match="BertModel has no head, but stage 'kl' needs logits"):
        check(config(method="one_shot"), headless)


def test_layers_are_matched_of_models_with_a_stack_of_blocks_alone(config, student):
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    resnet = PartialForward(hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)))
    bert, matched = PartialForward(student), {"stages": [{"hidden": [[1, 1]], "kl_weight": 1.0}]}
    for fields in ({"method": "curriculum"}, {"method": "hidden"}, matched):
        for pair in ((resnet, None), (bert, resnet)):
            with pytest.raises(ValueError, match=r"The hidden states of ResNet.* \(depths=\[1, 1\]\), so that layers"):
                check_blocks(config(**fields), *pair)
        check_blocks(config(**fields), bert, None)
    for fields in ({"method": "one_shot"}, {"method": "online"}, {"stages": [{"label_weight": 1.0}]}):
        check_blocks(config(**fields), resnet, resnet)


def test_an_online_teachers_states_cannot_be_standardised(config, student):
    fields = {"method": "online", "stages": [{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}]}
    check(config(**fields, standardize_targets=False), student)
    with pytest.raises(ValueError, match="standardize_targets would measure them before it has learnt anything"):
        check(config(**fields), student)


def test_deepspeed_would_shrink_what_a_layer_stage_leaves_out(config, student):
    decayed = {"weight_decay": 0.1}
    check(config(), student, deepspeed=True)
    check(config(**decayed), student)
    check(config(method="one_shot", **decayed), student, deepspeed=True)
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1, but DeepSpeed takes missing gradients for zeros"):
        check(config(**decayed), student, deepspeed=True)


def test_deepspeed_keeps_its_optimizer(config, student):
    check(config(carry_optimizer=False), student)
    with pytest.raises(ValueError, match="carry_optimizer=False can't be had with DeepSpeed"):
        check(config(carry_optimizer=False), student, deepspeed=True)


def test_substituted_inputs_are_not_recomputed_by_hooks_inside_a_checkpoint(config, student, monkeypatch):
    segments = {"train_prefix": "independent", "layer_order": "together", "gradient_checkpointing": True}
    called = GradientCheckpointingLayer.__call__
    if "__call__" in vars(GradientCheckpointingLayer):  # before 5.23
        monkeypatch.delattr(GradientCheckpointingLayer, "__call__")
    check(config(**segments), student)
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", lambda *args: called(*args), raising=False)  # < 5.23
    check(config(**segments | {"gradient_checkpointing": False}), student)
    with pytest.raises(ValueError, match="train_prefix='independent' gives blocks of BertForMaskedLM other inputs"):
        check(config(**segments), student)


# ---- stages that train nothing ----


def frozen(student, blocks):
    student.bert.embeddings.requires_grad_(False)
    for block in student.bert.encoder.layer[:blocks]:
        block.requires_grad_(False)
    return student


@pytest.mark.parametrize(
    "blocks, fields, named",
    [
        (1, {}, r"'layer 1' .* up to block 1, .*with layer_map=\[\[2, 4\]\]"),
        (2, {}, r"'layer 1', 'layer 2' .* up to block 2, .*unfreeze some of them\."),
        (2, {"layer_order": "last"}, r"'layer 2'"),
        (1, {"stages": [{"hidden": [[0, 0]], "until": 2}, {"kl_weight": 1.0}]}, r"'layer 0' .* up to block 0"),
    ],
)
def test_stages_that_would_train_nothing_are_named_with_the_mend(
    config, student, teacher, examples, blocks, fields, named
):
    with pytest.raises(ValueError, match=named):
        CurriculumDistillationTrainer(
            frozen(student, blocks), config(**fields), train_dataset=examples, teacher_model=teacher
        )


def test_a_student_all_frozen_trains_in_no_stage(config, student, teacher, examples):
    args = config(method="one_shot")
    with pytest.raises(ValueError, match="'kl' would train nothing"):
        CurriculumDistillationTrainer(
            student.requires_grad_(False), args, train_dataset=examples, teacher_model=teacher
        )


def test_the_mend_trains_and_one_free_parameter_is_enough(config, student, teacher, examples):
    args = config(layer_map=[[2, 4]], max_steps=4)
    CurriculumDistillationTrainer(frozen(student, 1), args, train_dataset=examples, teacher_model=teacher).train()
    student.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    CurriculumDistillationTrainer(student, config(max_steps=4), train_dataset=examples, teacher_model=teacher).train()


def test_a_block_that_a_stage_freezes_itself_does_not_count(config, student, teacher, examples):
    student.bert.encoder.layer[1].requires_grad_(False)  # with train_prefix="block" the only one of the second stage
    with pytest.raises(ValueError, match="'layer 2' would train nothing"):
        CurriculumDistillationTrainer(
            student, config(train_prefix="block"), train_dataset=examples, teacher_model=teacher
        )
    CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)


# ---- caches ----


LABELS = {
    "too few weights": ({"class_weights": [1.0, 2.0], "label_loss_weight": 1.0}, "has 2 numbers, .* has 50 classes"),
    "weights of no label": ({"class_weights": [1.0] * VOCAB_SIZE}, "class_weights was given, but no stage learns from"),
    "no choice": ({"teacher_entropy_threshold": 0.5}, "chooses between teacher and label, but no stage learns from bo"),
    "labels alone": ({"teacher_entropy_threshold": 0.5, "method": "labels"}, "no stage learns from both; set label_lo"),
}


@pytest.mark.parametrize("fields, message", LABELS.values(), ids=LABELS)
def test_what_would_have_no_effect_on_labels_is_refused(config, student, teacher, examples, fields, message):
    with pytest.raises(ValueError, match=message):
        make(student, teacher, config(**fields), examples)


def test_weights_of_classes_need_stages(config, student, teacher, examples):
    with pytest.raises(ValueError, match=r"class_weights was given without teacher_model and stages, .*label_weight"):
        make(student, None, config(class_weights=[1.0] * VOCAB_SIZE), examples)


def test_a_cache_that_no_stage_reads_is_refused(config, student, tmp_path):
    stages = {"stages": [{"label_weight": 1.0}]}
    check_cache(config(**stages).resolve_stages(STUDENT_DEPTH, TEACHER_DEPTH), config(**stages), student)
    args = config(**stages, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="teacher_cache was given, but no stage needs the teacher"):
        check_cache(args.resolve_stages(STUDENT_DEPTH, TEACHER_DEPTH), args, student)


@pytest.mark.parametrize("k", [VOCAB_SIZE - 1, VOCAB_SIZE, None])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "hard"])
@pytest.mark.parametrize("stages", [[{"hidden": [[1, 2]]}], [{"kl_weight": 1.0}]], ids=["hidden", "kl"])
def test_only_the_forward_divergence_and_hard_labels_can_do_with_a_part_of_the_logits(
    config, student, tmp_path, k, divergence, stages
):
    fields = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_logits": k, "divergence": divergence}
    args = config(**fields, stages=stages)
    resolved = args.resolve_stages(STUDENT_DEPTH, TEACHER_DEPTH)
    if k == VOCAB_SIZE - 1 and divergence not in ("forward_kl", "hard") and "kl_weight" in stages[0]:
        with pytest.raises(ValueError, match=f"of {VOCAB_SIZE} classes teacher_cache keeps {k} and the rest as one"):
            check_cache(resolved, args, student)
    else:
        check_cache(resolved, args, student)


# ---- data sets ----


def test_a_data_set_must_have_an_example_or_a_batch_of_them_where_the_rest_is_dropped(config):
    check_training_data([1], config())
    check_training_data([1] * 4, config(dataloader_drop_last=True))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        check_training_data([], config())
    with pytest.raises(ValueError, match=r"has 3 examples, fewer than a batch of all processes \(4\)"):
        check_training_data([1] * 3, config(dataloader_drop_last=True))


def test_a_stream_must_say_where_stages_end(config):
    check_training_data(iter([]), config(max_steps=8))
    with pytest.raises(ValueError, match="max_steps is not set and train_dataset has no length"):
        check_training_data(iter([]), config(max_steps=-1))
