"""What labels and rows of logits are, by a model's class: against lists by hand and the models' own losses."""

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, build

from hf_curriculum_distill.layers.heads import (
    auxiliary_loss,
    balances_experts,
    decodes_labels,
    has_known_head,
    head_of,
    is_ctc,
    makes_decoder_inputs_itself,
    num_classes,
    predicts_next_token,
)

MODELS = {name: build(name)[0] for name in ("bert", "bert-tagger", "llama", "gpt2", "t5", "bart", "vit")}
MODELS["llama-classifier"] = build("llama-classifier")[0]
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}


def mixtral(model_class=hf.MixtralForCausalLM, **config):
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    return model_class(hf.MixtralConfig(**SIZES | experts | config))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_predict_the_next_token(name):
    assert predicts_next_token(MODELS[name])


@pytest.mark.parametrize("name", ["bert", "bert-tagger", "t5", "bart", "vit", "llama-classifier"])
def test_others_predict_in_place(name):
    assert not predicts_next_token(MODELS[name])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "xlnet"])
def test_a_model_predicts_the_next_token_iff_its_own_loss_compares_logits_with_the_label_after_them(name):
    xlnet = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
    model = hf.XLNetLMHeadModel(hf.XLNetConfig(**xlnet)) if name == "xlnet" else MODELS[name]
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids, labels=ids)
    logits = outputs.logits
    losses = {
        True: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        False: torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()),
    }
    for shifts, loss in losses.items():
        assert torch.isclose(outputs.loss, loss, rtol=1e-5) == (predicts_next_token(model) == shifts)


def test_a_model_makes_its_decoders_inputs_itself_iff_its_configuration_tells_of_no_decoder():
    assert not any(map(makes_decoder_inputs_itself, MODELS.values()))
    t5 = {"vocab_size": 50, "d_model": 16, "num_layers": 1, "d_kv": 8, "d_ff": 16}
    opt = SIZES | {"ffn_dim": 16, "word_embed_proj_dim": 16}
    with torch.device("meta"):
        assert makes_decoder_inputs_itself(hf.BlipForQuestionAnswering(hf.BlipConfig()))
        for text, itself in ((hf.T5Config(**t5), True), (hf.OPTConfig(**opt), False)):
            model = hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(text_config=text))
            assert makes_decoder_inputs_itself(model) == itself


def test_labels_are_a_decoders_tokens_iff_the_model_is_an_encoder_decoder_and_no_classifier():
    bart = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    classifier = hf.BartForSequenceClassification(hf.BartConfig(**bart, decoder_ffn_dim=16))
    assert classifier.config.is_encoder_decoder
    assert not decodes_labels(classifier)
    decoding = {"t5", "bart", "bert-to-bert", "whisper"}
    for name in (*MODELS, "bert-to-bert", "whisper"):
        assert decodes_labels(build(name)[0]) == (name in decoding)


def test_only_models_for_ctc_are_ctc_models_and_so_are_classes_derived_from_them():
    made = ARCHITECTURES["wav2vec2"][1]

    class Derived(hf.Wav2Vec2ForCTC):
        pass

    assert is_ctc(hf.Wav2Vec2ForCTC(made)) and is_ctc(Derived(made))
    assert not is_ctc(build("wav2vec2")[0])
    assert not any(map(is_ctc, MODELS.values()))


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "bert-tagger", "gpt2", "t5", "llama-classifier", "vit"])
def test_the_number_of_classes_is_the_width_of_the_logits(name):
    model, _, batch = build(name)
    with torch.no_grad():
        assert num_classes(model) == model(**batch).logits.shape[-1]


def test_the_number_of_classes_of_an_audio_model_is_that_of_its_head_and_where_none_is_said_it_is_none():
    made = ARCHITECTURES["wav2vec2"][1]
    assert made.num_labels != made.vocab_size
    assert num_classes(hf.Wav2Vec2ForSequenceClassification(made)) == made.num_labels
    assert num_classes(hf.Wav2Vec2ForCTC(made)) == made.vocab_size
    assert num_classes(hf.ViTModel(ARCHITECTURES["vit"][1])) is None


@pytest.mark.parametrize("routers", [True, False])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_the_auxiliary_loss_is_what_a_mixture_of_experts_adds_to_its_cross_entropy(routers, weight):
    model = mixtral(output_router_logits=routers, router_aux_loss_coef=weight).eval()
    ids = torch.randint(3, 50, (2, 6))
    outputs = model(input_ids=ids, labels=ids)
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(plain + auxiliary_loss(model, outputs), outputs.loss)
    assert balances_experts(model) == routers


def test_models_without_experts_have_no_auxiliary_loss():
    assert not any(map(balances_experts, MODELS.values()))
    assert auxiliary_loss(MODELS["bert"], {"aux_loss": torch.ones(())}) == 0


# ---- what a row is ----


def bert(model_class, **config):
    return model_class(hf.BertConfig(**SIZES, **config))


@pytest.mark.parametrize(
    "config, row",
    [
        ({}, "a class"),
        ({"num_labels": 1}, "a number"),
        ({"num_labels": 3, "problem_type": "regression"}, "a number"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "a class"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "yes or no for a class"),
    ],
)
def test_a_classifiers_problem_type_says_what_its_rows_are_and_one_label_is_a_number(config, row):
    head = head_of(bert(hf.BertForSequenceClassification, **config))
    assert head.name == row
    assert head.rows_per_example == (None if row == "a class" else config["num_labels"])
    assert head_of(bert(hf.BertForTokenClassification, **config)).name == "a class"


@pytest.mark.parametrize(
    "model_class, row",
    [
        (hf.BertForQuestionAnswering, "a token of the text"),
        (hf.BertForMultipleChoice, "a choice"),
        (hf.BertForMaskedLM, "a class"),
        (hf.BertModel, "a class"),
    ],
)
def test_other_rows_follow_from_the_class_and_its_subclasses(model_class, row):
    assert head_of(bert(model_class)).name == head_of(bert(type("Own", (model_class,), {}))).name == row


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_the_label_loss_of_rows_is_the_models_own(kind):
    model = bert(hf.BertForSequenceClassification, num_labels=3, problem_type=kind).eval()
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    inputs = {"input_ids": torch.randint(3, 50, (2, 6)), "labels": labels}
    with torch.no_grad():
        outputs, head = model(**inputs), head_of(model)
    rows = head.logits(outputs).flatten(0, -2)
    assert rows.shape == (6, num_classes(model))
    loss = head.label_loss(rows, head.labels(inputs).flatten()) / 6
    torch.testing.assert_close(loss, outputs.loss)


def test_a_span_that_ends_outside_of_the_input_does_not_count_as_in_the_models_own_loss():
    model = bert(hf.BertForQuestionAnswering).eval()
    positions = {"start_positions": torch.tensor([1, 9, 3]), "end_positions": torch.tensor([2, 9, 4])}
    inputs = {"input_ids": torch.randint(3, 50, (3, 6))} | positions
    with torch.no_grad():
        outputs, head = model(**inputs), head_of(model)
    labels = head.labels(inputs)
    assert labels.tolist() == [[1, 2], [-100, -100], [3, 4]]
    loss = head.label_loss(head.logits(outputs).flatten(0, -2), labels.flatten()) / 4
    torch.testing.assert_close(loss, outputs.loss)


def test_a_head_is_known_by_the_class_of_its_model_or_of_a_base():
    known = (hf.BertForMaskedLM, hf.BertForQuestionAnswering, hf.BertForMultipleChoice, hf.BertForTokenClassification)
    assert all(has_known_head(bert(type("Own", (model_class,), {}))) for model_class in known)
    assert not any(has_known_head(bert(model_class)) for model_class in (hf.BertModel, hf.BertForPreTraining))
