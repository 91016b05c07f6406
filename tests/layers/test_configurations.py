"""A student's configuration, in the terms of its teacher's family."""

import pytest
import transformers as hf
from architectures import ARCHITECTURES

from hf_curriculum_distill.layers.configurations import choose_layers, student_config, student_size
from hf_curriculum_distill.stages import resolve_layer_map


@pytest.mark.parametrize("depth", range(1, 9))
def test_uniform_layers_are_those_of_the_uniform_layer_map_and_end_with_the_last(depth):
    for num_layers in range(1, depth + 1):
        layers = choose_layers("uniform", num_layers, depth)
        assert layers == [teacher for _, teacher in resolve_layer_map("uniform", None, num_layers, depth)]
        assert layers[-1] == depth
    assert choose_layers("uniform", depth, depth) == [*range(1, depth + 1)]


def test_names_are_sizes_unless_a_file_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert student_size("teacher-6-192") == (6, 192)
    (tmp_path / "teacher-6-192").mkdir()
    assert [student_size(name) for name in ("teacher-6-192", "teacher", "teacher-x", "bert-2-64")] == [None] * 4


FAMILIES = {  # teacher, hidden size, what it becomes
    "minilm": (
        hf.BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536),
        192,
        {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768},
    ),
    "as many heads where their width does not divide": (
        hf.BertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=12),
        240,
        {"num_attention_heads": 12, "intermediate_size": 960},
    ),
    "smollm2": (
        hf.LlamaConfig(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
        ),
        192,
        {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}
        | {"intermediate_size": 512},
    ),
    "qwen2.5-0.5b: 3 heads can't share keys in groups of 7": (
        hf.Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
        ),
        192,
        {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 1040},
    ),
    "heads as wide as the configuration says": (
        hf.Qwen3Config(
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
        ),
        512,
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 1536},
    ),
    "gpt2": (hf.GPT2Config(n_layer=12), 256, {"n_embd": 256, "n_head": 4, "n_inner": None}),
    "distilbert": (hf.DistilBertConfig(n_layers=6), 256, {"dim": 256, "n_heads": 4, "hidden_dim": 1024}),
    "t5": (hf.T5Config(num_layers=6), 256, {"d_model": 256, "num_heads": 4, "d_kv": 64, "d_ff": 1024}),
    "bart": (
        hf.BartConfig(),
        512,
        {"d_model": 512, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048}
        | {"decoder_ffn_dim": 2048},
    ),
    "opt": (hf.OPTConfig(), 384, {"hidden_size": 384, "word_embed_proj_dim": 384, "ffn_dim": 1536}),
    "factorised embeddings stay": (
        hf.ElectraConfig(embedding_size=128, hidden_size=256, num_attention_heads=4, intermediate_size=1024),
        128,
        {"embedding_size": 128, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrower_student_is_scaled_in_its_familys_terms(name):
    teacher, hidden_size, expected = FAMILIES[name]
    before = teacher.to_dict()
    config = student_config(teacher, 2, hidden_size=hidden_size)
    found = config.to_dict()
    assert {field: found[field] for field in expected} == expected
    assert (config.num_hidden_layers, config.hidden_size) == (2, hidden_size)
    assert config.vocab_size == teacher.vocab_size
    assert teacher.to_dict() == before
    allowed = {*expected, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"}
    allowed |= {"encoder_layers", "decoder_layers", "layer_types", "hidden_size", "num_attention_heads"}
    assert {field for field in found if found[field] != before.get(field)} - {"_name_or_path"} <= allowed


@pytest.mark.parametrize(
    "name, layers, field, values",
    [
        ("gemma3", [1, 3], "layer_types", (0, 2)),
        ("modernbert", [1, 2], "layer_types", (0, 1)),
        ("smollm3", [1, 3], "no_rope_layers", (0, 2)),
        ("gpt-neo", [2, 3], "attention_layers", (1, 2)),
    ],
)
def test_lists_with_an_entry_for_each_block_keep_those_of_the_chosen_ones(name, layers, field, values):
    teacher = ARCHITECTURES[name][1]
    config = student_config(teacher, len(layers), layers)
    assert getattr(config, field) == [getattr(teacher, field)[index] for index in values]
    assert type(teacher).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_lists_of_block_numbers_are_renumbered():
    teacher = hf.Qwen2MoeConfig(num_hidden_layers=6, mlp_only_layers=[0, 3, 5])
    assert student_config(teacher, 3, [1, 2, 6]).mlp_only_layers == [0, 2]
    assert student_config(teacher, 2, [2, 3]).mlp_only_layers == []


def test_lists_of_anything_else_stay():
    """As many convolutions, or kinds of attention, as blocks."""
    teacher = hf.DebertaV2Config(num_hidden_layers=2, relative_attention=True, pos_att_type=["p2c", "c2p"])
    assert student_config(teacher, 1).pos_att_type == ["p2c", "c2p"]


def test_one_stack_of_an_encoder_decoder_keeps_its_depth():
    teacher = hf.BartConfig(encoder_layers=12, decoder_layers=6)
    both, encoder, decoder = (student_config(teacher, 3, stack=stack) for stack in (None, "encoder", "decoder"))
    assert [(c.encoder_layers, c.decoder_layers) for c in (both, encoder, decoder)] == [(3, 3), (3, 6), (12, 3)]


@pytest.mark.parametrize(
    "teacher, given, message",
    [
        (hf.BertConfig(), {"num_layers": 13}, "num_layers is 13, but the teacher has 12 blocks"),
        (hf.BertConfig(), {"num_layers": True}, "num_layers is True"),
        (hf.BertConfig(), {"num_layers": 2, "layers": [0, 1]}, r"layers is \[0, 1\], but the blocks of the teacher"),
        (hf.BertConfig(), {"num_layers": 2, "layers": [3, 1]}, "in increasing order"),
        (hf.BertConfig(), {"num_layers": 2, "layers": [1.0, 2]}, r"layers is \[1.0, 2\]; use 'uniform'"),
        (hf.BertConfig(), {"num_layers": 2, "hidden_size": 100}, "12 heads of width 64; use a multiple of 64 or of 12"),
        (hf.GPTNeoXConfig(hidden_size=768, num_attention_heads=12), {"num_layers": 2, "hidden_size": 180}, "of 64, so"),
        (hf.Mamba2Config(num_hidden_layers=2), {"num_layers": 2, "hidden_size": 100}, "There is no Mamba2Config with"),
        (
            hf.BeitConfig(out_indices=[3, 5, 7, 11]),
            {"num_layers": 6},
            r"has out_indices=\[3, 5, 7, 11\], so that features of 12 blocks",
        ),
    ],
)
def test_what_makes_no_configuration_is_refused(teacher, given, message):
    with pytest.raises(ValueError, match=message):
        student_config(teacher, **given)
