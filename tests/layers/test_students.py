"""Students made from a teacher: a copy is the teacher without some blocks, a narrower one is of its family."""

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, DEPTH, VOCAB_SIZE, build
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights

from hf_curriculum_distill import (
    CurriculumDistillationTrainer,
    ProjectionBank,
    project_embeddings,
    student_from_teacher,
)
from hf_curriculum_distill.layers import find_block_stack, make_student
from hf_curriculum_distill.layers.forward import PartialForward
from layers.test_forward import blocks_of, every_architecture

# block 1 of these has no norm of its own, for the embeddings end with one
STARTS_WITH_THE_FIRST = ("modernbert", "modernbert-decoder")
# with 2 blocks, their 2 convolutions could be the stack, too
SPEECH = ("wav2vec2", "hubert")


@torch.no_grad()
def logits(model, batch):
    torch.manual_seed(1)
    return model.eval()(**batch).logits


def choice(name):
    """Layers of the teacher that a student of this family can have, and are not the first ones."""
    return [1, 3] if name in STARTS_WITH_THE_FIRST else [3] if name in SPEECH else [2, 3]


def bank(student_dim, teacher_dim, pairs=((1, 2), (2, 3)), **fields):
    dims = [student_dim] * len(pairs), [teacher_dim] * len(pairs)
    return ProjectionBank.create(pairs, *dims, **{"shared": True} | fields)


@every_architecture
def test_a_student_is_the_teacher_if_and_only_if_it_has_all_of_its_blocks(name):
    teacher, _, batch = build(name)
    before, expected = weights(teacher), logits(teacher, batch)
    whole = student_from_teacher(teacher, DEPTH, stack="encoder")
    assert_same_weights(weights(whole), before)
    assert torch.equal(logits(whole, batch), expected)
    layers = choice(name)
    assert not torch.equal(logits(student_from_teacher(teacher, len(layers), layers, stack="encoder"), batch), expected)
    assert_same_weights(weights(teacher), before)


@every_architecture
def test_a_copy_runs_the_chosen_blocks_alone_and_is_the_model_that_its_folder_holds(name, tmp_path):
    teacher, block, batch = build(name)
    layers = choice(name)
    student = student_from_teacher(teacher, len(layers), layers, stack="encoder")
    ours, theirs = find_block_stack(student), blocks_of(teacher, block)
    assert ours == blocks_of(student, block)
    for copied, number in zip(ours, layers, strict=True):
        own = weights(theirs[number - 1])
        assert_same_weights({key: tensor for key, tensor in weights(copied).items() if key in own}, own)
    addresses = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not any(tensor.data_ptr() in addresses for tensor in student.state_dict().values())
    student.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(student, batch))


@pytest.mark.parametrize(
    "name", sorted(ARCHITECTURES.keys() - {"deberta-v2"})
)  # has a convolution after its first block
def test_a_copy_computes_what_the_teacher_does_whose_other_blocks_are_the_identity(name):
    teacher, block, batch = build(name)
    student = student_from_teacher(teacher, len(choice(name)), choice(name), stack="encoder")
    for number, module in enumerate(blocks_of(teacher, block), start=1):
        if number not in choice(name):
            plain = module.forward
            module.forward = lambda *args, plain=plain, **kwargs: identity(plain(*args, **kwargs), args, kwargs)
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch))


def identity(output, args, kwargs):
    states = args[0] if args else kwargs["hidden_states"]
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


@every_architecture
def test_a_narrower_student_is_of_the_same_family_and_trains(name, tmp_path):
    teacher, _, batch = build(name)
    teacher.requires_grad_(False)
    layers = choice(name)
    student = student_from_teacher(teacher, len(layers), layers, hidden_size=16, stack="encoder")
    assert type(student) is type(teacher)
    stack = PartialForward(student)
    assert (stack.depth, stack.hidden_size) == (len(layers), 16)
    assert student.num_parameters() < teacher.num_parameters()
    if name == "mixtral":
        student.set_experts_implementation("eager")  # grouped products need rows of 16 bytes
    hidden, out = stack(student.train(), batch, [1], logits=True)
    assert hidden[1].shape[-1] == 16
    assert out.shape[-1] == logits(teacher, batch).shape[-1]
    out.sum().backward()
    student.save_pretrained(tmp_path)
    assert_same_weights(weights(type(student).from_pretrained(tmp_path)), weights(student))


def test_a_student_trains_and_its_folder_is_a_plain_model(config, tmp_path):
    teacher, examples = tiny_bert(4, seed=2, initializer_range=0.3), masked_lm_examples(16)
    student = student_from_teacher(teacher.requires_grad_(False), 2)
    before = weights(student)
    stages = [{"hidden": [[2, 4]], "until": 1}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
    trainer.train()
    trained = weights(student)
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    loaded = hf.AutoModelForMaskedLM.from_pretrained(f"{args.output_dir}/checkpoint-2")
    assert_same_weights(weights(loaded), trained)

    resumed = student_from_teacher(teacher, 2)
    trainer = CurriculumDistillationTrainer(resumed, args, train_dataset=examples, teacher_model=teacher)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-1")
    assert_same_weights(weights(resumed), trained)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_others_stay_two(tied):
    teacher = tiny_bert(3, tie_word_embeddings=tied)
    student = student_from_teacher(teacher, 2)
    table, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert (table is head) == tied
    assert torch.equal(table, teacher.get_input_embeddings().weight)
    assert torch.equal(head, teacher.get_output_embeddings().weight)


def test_ties_that_the_configuration_does_not_know_are_refused():
    teacher = tiny_bert(3, tie_word_embeddings=False)
    teacher.cls.predictions.decoder.weight = teacher.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tied weights"):
        student_from_teacher(teacher, 2)


def test_a_student_has_the_teachers_dtype_generation_and_labels_but_no_name_of_it(tmp_path):
    saved = build("llama-classifier")[0]
    saved.config.id2label = {0: "a", 1: "b", 2: "c"}
    saved.save_pretrained(tmp_path)
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for student in (student_from_teacher(teacher, 2), student_from_teacher(teacher, 2, hidden_size=16)):
        assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
        assert student.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert student.name_or_path == student.config.name_or_path == ""
        assert teacher.name_or_path == str(tmp_path)
        assert not student.training
        assert all(parameter.requires_grad for parameter in student.parameters())

    teacher = build("gpt2")[0]
    teacher.generation_config.max_new_tokens = 7
    student = student_from_teacher(teacher, 2)
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert student.generation_config is not teacher.generation_config
    ids = torch.randint(3, VOCAB_SIZE, (1, 4))
    cached = student.generate(ids, do_sample=False)
    assert torch.equal(cached, student.generate(ids, do_sample=False, use_cache=False))


def test_a_student_attends_as_its_teacher_does(tmp_path):
    build("llama")[0].save_pretrained(tmp_path)
    teacher = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for student in (student_from_teacher(teacher, 2), student_from_teacher(teacher, 2, hidden_size=16)):
        output = student(torch.randint(3, VOCAB_SIZE, (1, 4)), output_attentions=True)
        assert len(output.attentions) == 2  # which no faster implementation returns


def test_a_teacher_that_was_cast_is_copied_with_the_buffers_that_it_computes_with():
    teacher, _, batch = build("llama")
    teacher.to(torch.bfloat16)
    assert torch.equal(logits(student_from_teacher(teacher, DEPTH), batch), logits(teacher, batch))


@pytest.mark.parametrize("name", ["bart", "t5", "whisper", "bert-to-bert"])
def test_both_stacks_of_an_encoder_decoder_are_cut_or_the_one_that_is_named(name):
    teacher, _, batch = build(name)
    depths = {}
    for stack in (None, "encoder", "decoder"):
        student = student_from_teacher(teacher, 1, stack=stack)
        depths[stack] = [len(find_block_stack(student, one)) for one in ("encoder", "decoder")]
        logits(student, batch)
    assert depths == {None: [1, 1], "encoder": [1, 2], "decoder": [3, 1]}
    with pytest.raises(ValueError, match="num_layers is 3, but the teacher's decoder has 2 blocks"):
        student_from_teacher(teacher, 3)
    teacher.generation_config.alignment_heads = [[1, 0]]  # of Whisper's last block, for timestamps
    kept = {stack: student_from_teacher(teacher, 2, stack=stack).generation_config for stack in (None, "encoder")}
    assert all(generation.alignment_heads == [[1, 0]] for generation in kept.values())
    assert not hasattr(student_from_teacher(teacher, 1).generation_config, "alignment_heads")


def test_t5_takes_the_positions_that_all_blocks_use_from_the_block_that_holds_them():
    teacher = build("t5")[0]
    student = student_from_teacher(teacher, 1, "last")
    for stack in ("encoder", "decoder"):
        ours, theirs = find_block_stack(student, stack), find_block_stack(teacher, stack)
        own = ours[0].layer[0].SelfAttention
        assert torch.equal(
            own.relative_attention_bias.weight, theirs[0].layer[0].SelfAttention.relative_attention_bias.weight
        )
        assert torch.equal(own.q.weight, theirs[-1].layer[0].SelfAttention.q.weight)


@pytest.mark.parametrize("groups, num_layers", [(1, 4), (2, 2), (3, 3)])
def test_blocks_that_run_for_many_layers_run_for_fewer(groups, num_layers):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 6}
    teacher = hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=50, num_hidden_groups=groups, **sizes))
    student = student_from_teacher(teacher, num_layers)
    assert student.config.num_hidden_layers == num_layers
    assert_same_weights(weights(student), weights(teacher))


def test_mixtures_of_experts_keep_their_experts_blocks():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"intermediate_size": 16, "intermediate_size_mlp": 36, "num_key_value_heads": 2, "pad_token_id": 0}
    config = hf.Llama4TextConfig(**sizes, num_local_experts=2, interleave_moe_layer_step=2)
    teacher = hf.Llama4ForCausalLM(config)
    assert teacher.config.moe_layers == [1, 3]
    student = student_from_teacher(teacher, 2, [1, 4])
    assert student.config.moe_layers == [1]
    assert student.config.layer_types == [teacher.config.layer_types[index] for index in (0, 3)]
    assert student.config.no_rope_layers == [teacher.config.no_rope_layers[index] for index in (0, 3)]
    for ours, theirs in zip(student.model.layers, (teacher.model.layers[index] for index in (0, 3)), strict=True):
        assert_same_weights(weights(ours), weights(theirs))


# ---- embeddings ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_projected_embeddings_put_the_students_states_into_the_basis_of_the_targets(name):
    teacher, _, batch = build(name)
    projections = bank(16, 32, kind="orthogonal", seed=4)
    student = student_from_teacher(teacher, 2, hidden_size=16, projection_bank=projections)
    states = [PartialForward(model)(model.eval(), batch, [0])[0][0] for model in (student, teacher)]
    torch.testing.assert_close(states[0], projections.project(1, states[1]), atol=1e-6, rtol=1e-5)


def test_every_table_of_the_embeddings_is_projected_and_a_tied_head_with_it():
    teacher, _, _ = build("bert")
    torch.manual_seed(5)
    plain = student_from_teacher(teacher, 2, hidden_size=16)
    torch.manual_seed(5)
    student = student_from_teacher(teacher, 2, hidden_size=16, projection_bank=bank(16, 32))
    matrix = bank(16, 32).tensors()["layer_1_2.weight"]
    ours, theirs = student.bert.embeddings, teacher.bert.embeddings
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        torch.testing.assert_close(getattr(ours, table).weight, getattr(theirs, table).weight @ matrix.T)
    assert student.get_output_embeddings().weight is ours.word_embeddings.weight
    others = [
        {n: t for n, t in weights(model).items() if "_embeddings" not in n and "decoder.w" not in n}
        for model in (student, plain)
    ]
    assert_same_weights(*others)


def test_embeddings_are_projected_into_any_student_of_the_vocabulary_as_far_as_it_has_positions():
    teacher = build("bert")[0]
    config = hf.RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        type_vocab_size=3,
    )
    student = hf.RobertaForMaskedLM(config).to(torch.bfloat16)
    last = student.roberta.embeddings.token_type_embeddings.weight[2].clone()
    one_pair = bank(16, 32, pairs=[(1, 1)], shared=False)
    assert project_embeddings(student, teacher, one_pair) is student
    matrix = one_pair.tensors()["layer_1_1.weight"]
    ours, theirs = student.roberta.embeddings, teacher.bert.embeddings
    expected = (theirs.position_embeddings.weight[:18] @ matrix.T).bfloat16()
    assert torch.equal(ours.position_embeddings.weight[2:], expected)  # RoBERTa's first position
    assert torch.equal(ours.token_type_embeddings.weight[2], last)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_tables_that_are_computed_stay_as_they_are():
    teacher = build("whisper")[0]
    projected = student_from_teacher(teacher, 1, hidden_size=16, projection_bank=bank(16, 32))
    encoder, plain = projected.model.encoder, student_from_teacher(teacher, 1, hidden_size=16).model.encoder
    assert torch.equal(encoder.embed_positions.weight, plain.embed_positions.weight)
    matrix = bank(16, 32).tensors()["layer_1_2.weight"]
    ours, theirs = projected.model.decoder, teacher.model.decoder
    torch.testing.assert_close(ours.embed_positions.weight, theirs.embed_positions.weight @ matrix.T)


@pytest.mark.parametrize(
    "name, projections, message",
    [
        ("bert", bank(16, 32, shared=False), "a matrix of its own for each of 2 layers.*shared=True"),
        ("bert", bank(16, 32, kind="pca"), "is a PCA that was not measured yet"),
        ("bert", bank(8, 32), r"matrices of shape \(8, 32\), but student and teacher need \[16, 32\]"),
        ("electra", bank(16, 32), "no table as wide as its hidden states"),
        ("mobilebert", bank(16, 32), "no table as wide as its hidden states"),
        ("vit", bank(16, 32), "student is a ViTForImageClassification, whose input embeddings are no table"),
        ("wav2vec2", bank(16, 32), "whose input embeddings are no table"),
    ],
)
def test_what_does_not_fit_the_embeddings_is_refused(name, projections, message):
    with pytest.raises(ValueError, match=message):
        student_from_teacher(build(name)[0], 1, hidden_size=16, projection_bank=projections)


@pytest.mark.parametrize("kind", [hf.RobertaConfig, hf.MPNetConfig, hf.NystromformerConfig])
def test_a_position_has_the_entry_of_the_same_position(kind):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = hf.AutoModel.from_config(kind(**sizes, intermediate_size=32, max_position_embeddings=26))
    student = tiny_bert(2, vocab_size=99)
    project_embeddings(student, teacher, bank(16, 32))
    ours, theirs = (model.embeddings.position_embeddings.weight for model in (student.bert, teacher))
    teacher(torch.arange(5, 29)[None]).last_hidden_state[..., 0].sum().backward()
    read = theirs.grad.any(-1)  # what 24 tokens read
    torch.testing.assert_close(ours[:24], theirs[read] @ bank(16, 32).tensors()["layer_1_2.weight"].T)


@pytest.mark.parametrize("size", [50, 120])
def test_embeddings_of_other_tokens_are_refused_and_padding_is_not(size):
    teacher, student = build("bert")[0], tiny_bert(2, vocab_size=size)
    for num_tokens in (None, 51) if size == 50 else (None,):
        with pytest.raises(ValueError, match=f"vocabulary has {size} entries and the teacher's 99"):
            project_embeddings(student, teacher, bank(16, 32), num_tokens)
    project_embeddings(student, teacher, bank(16, 32), num_tokens=50)
    ours, theirs = (model.get_input_embeddings().weight[: min(size, 99)] for model in (student, teacher))
    torch.testing.assert_close(ours, theirs @ bank(16, 32).tensors()["layer_1_2.weight"].T)


# ---- names ----


def test_names_stand_for_students():
    teacher = build("bert")[0]
    assert_same_weights(weights(make_student("teacher-2", teacher)), weights(student_from_teacher(teacher, 2)))
    lowest = make_student("teacher-2", teacher, "lowest")
    assert_same_weights(weights(lowest), weights(student_from_teacher(teacher, 2, "lowest")))
    narrow = make_student("teacher-1-16", teacher, projection_bank=bank(16, 32))
    assert (narrow.config.num_hidden_layers, narrow.config.hidden_size) == (1, 16)
    with pytest.raises(ValueError, match="'bert-2-64' names no student of a teacher"):
        make_student("bert-2-64", teacher)


# ---- what is refused ----


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_layers": 4}, "num_layers is 4, but the teacher has 3 blocks; use a whole number from 1 to 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        (
            {"num_layers": 2, "layers": [1, 4]},
            r"layers is \[1, 4\], but the blocks of the teacher are numbered from 1 to 3",
        ),
        ({"num_layers": 2, "layers": [2, 2]}, "name each at most once"),
        ({"num_layers": 2, "layers": [1]}, "layers names 1 blocks, but num_layers is 2"),
        ({"num_layers": 2, "layers": "highest"}, "layers is 'highest'; use 'uniform', 'lowest', 'last'"),
        (
            {"num_layers": 2, "hidden_size": 18},
            "18, but the teacher has 4 heads of width 8; use a multiple of 8 or of 4",
        ),
        ({"num_layers": 2, "hidden_size": 0}, "hidden_size is 0"),
        ({"num_layers": 2, "stack": "decoder"}, "BertForMaskedLM is no encoder-decoder"),
        ({"num_layers": 2, "stack": "both"}, "stack is 'both'; use 'encoder', 'decoder'"),
        ({"num_layers": 2, "projection_bank": bank(32, 32)}, "the student is 32 wide as the teacher is"),
        (
            {"num_layers": 2, "hidden_size": 32, "projection_bank": bank(32, 32)},
            "the student is 32 wide as the teacher is",
        ),
    ],
)
def test_what_makes_no_student_is_refused_in_a_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        student_from_teacher(build("bert")[0], **given)


@pytest.mark.parametrize("name, layers", [("modernbert", "uniform"), ("modernbert-decoder", "last")])
def test_blocks_that_have_no_place_at_their_new_number_are_refused(name, layers):
    teacher, _, batch = build(name)
    with pytest.raises(ValueError, match=r"layers.0.attn_norm.weight.*a list that starts with 1"):
        student_from_teacher(teacher, 2, layers)
    logits(student_from_teacher(teacher, 2, "lowest"), batch)


def test_blocks_that_compute_otherwise_at_their_new_number_are_refused():
    teacher = hf.GPT2LMHeadModel(
        hf.GPT2Config(**ARCHITECTURES["gpt2"][1].to_diff_dict() | {"scale_attn_by_inverse_layer_idx": True})
    )
    with pytest.raises(
        ValueError, match=r"Block 2 of the GPT2LMHeadModel would be another one as block 1 \(attn.scaling"
    ):
        student_from_teacher(teacher, 2)


def test_blocks_that_run_for_many_layers_are_not_mixed():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 6}
    teacher = hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=50, num_hidden_groups=2, **sizes))
    with pytest.raises(ValueError, match="AlbertForMaskedLM runs one block for many layers"):
        student_from_teacher(teacher, 2, "lowest")


def test_models_without_a_stack_or_with_adapters_are_refused():
    with pytest.raises(ValueError, match="needs exactly one ModuleList"):
        student_from_teacher(hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2)), 2)
    with pytest.raises(ValueError, match="teacher is a str, but a student is made from a PreTrainedModel"):
        student_from_teacher("google-bert/bert-base-uncased", 2)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(build("bert")[0], peft.LoraConfig(target_modules=["query"]))
    for teacher in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"PreTrainedModel without adapters.*merge_and_unload\(\)"):
            student_from_teacher(teacher, 2)
    merged = adapted.merge_and_unload()
    assert_same_weights(weights(student_from_teacher(merged, DEPTH)), weights(merged))
