"""One tiny model of each supported architecture, and a random batch for it."""

import copy

import torch
import transformers as hf

DEPTH = 3
VOCAB_SIZE = 99


def _text(model):
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _text_pair(model):
    return _text(model) | {"decoder_input_ids": torch.randint(3, VOCAB_SIZE, (2, 5))}


def _image(model):
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _audio(model):
    return {"input_values": torch.randn(2, 400)}


def _speech_pair(model):
    return {"input_features": torch.randn(2, 80, 20), "decoder_input_ids": torch.randint(3, VOCAB_SIZE, (2, 5))}


_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 40,
}
_LLAMA = _BERT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VIT = {name: _BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
_VIT |= {"image_size": 16, "patch_size": 8, "num_labels": 3}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 40, "n_inner": 36}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_SPEECH = {
    name: _VIT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
_SPEECH |= {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
_SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "num_labels": 3}
_SPEECH |= {"vocab_size": 40, "mask_time_prob": 0.0}
_BART = {"vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": DEPTH, "decoder_layers": 2}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36}
_BART |= {"max_position_embeddings": 40, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

_WHISPER = _BART | {"max_source_positions": 10, "max_target_positions": 40, "num_mel_bins": 80}
_WHISPER |= {"pad_token_id": 0, "decoder_start_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None}

# name -> (model class, configuration, class name of its blocks, random batch)
ARCHITECTURES = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**_BERT), "BertLayer", _text),
    "bert-classifier": (hf.BertForSequenceClassification, hf.BertConfig(**_BERT), "BertLayer", _text),
    "bert-tagger": (
        hf.BertForTokenClassification,
        hf.BertConfig(**_BERT, classifier_dropout=0.0),  # a dropout after the last block draws numbers for each row
        "BertLayer",
        _text,
    ),
    "camembert": (hf.CamembertForMaskedLM, hf.CamembertConfig(**_BERT), "CamembertLayer", _text),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**_BERT), "RobertaLayer", _text),
    "xlm-roberta": (hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig(**_BERT), "XLMRobertaLayer", _text),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=VOCAB_SIZE, dim=32, n_layers=DEPTH, n_heads=4, hidden_dim=36),
        "TransformerBlock",
        _text,
    ),
    "deberta-v2": (
        hf.DebertaV2ForMaskedLM,
        hf.DebertaV2Config(**_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3),
        "DebertaV2Layer",
        _text,
    ),
    "electra": (hf.ElectraForMaskedLM, hf.ElectraConfig(**_BERT, embedding_size=16), "ElectraLayer", _text),
    "mpnet": (hf.MPNetForMaskedLM, hf.MPNetConfig(**_BERT), "MPNetLayer", _text),
    "mobilebert": (
        hf.MobileBertForMaskedLM,
        hf.MobileBertConfig(**_BERT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
        "MobileBertLayer",
        _text,
    ),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(**_BERT, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2),
        "ModernBertEncoderLayer",
        _text,
    ),
    "eurobert": (hf.EuroBertForMaskedLM, hf.EuroBertConfig(**_LLAMA), "EuroBertDecoderLayer", _text),
    "nomic-bert": (hf.NomicBertForMaskedLM, hf.NomicBertConfig(**_BERT), "NomicBertLayer", _text),
    "longformer": (
        hf.LongformerForMaskedLM,
        hf.LongformerConfig(**_BERT, attention_window=4),
        "LongformerLayer",
        _text,
    ),
    "big-bird": (
        hf.BigBirdForMaskedLM,
        hf.BigBirdConfig(**_BERT, attention_type="original_full"),
        "BigBirdLayer",
        _text,
    ),
    "modernbert-decoder": (
        hf.ModernBertDecoderForCausalLM,
        hf.ModernBertDecoderConfig(**_BERT, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2),
        "ModernBertDecoderLayer",
        _text,
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT), "GPT2Block", _text),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT, rotary_dim=4), "GPTJBlock", _text),
    "gpt-neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_layers=DEPTH,
            num_heads=4,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=4,
            max_position_embeddings=40,
        ),
        "GPTNeoBlock",
        _text,
    ),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_BERT), "GPTNeoXLayer", _text),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            ffn_dim=36,
            max_position_embeddings=40,
            layerdrop=0.0,
        ),
        "OPTDecoderLayer",
        _text,
    ),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=DEPTH, n_head=4),
        "BloomBlock",
        _text,
    ),
    "falcon": (
        hf.FalconForCausalLM,
        hf.FalconConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4),
        "FalconDecoderLayer",
        _text,
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA), "LlamaDecoderLayer", _text),
    "llama-classifier": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig(**_LLAMA, num_labels=3),
        "LlamaDecoderLayer",
        _text,
    ),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_LLAMA), "Qwen2DecoderLayer", _text),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_LLAMA), "Qwen3DecoderLayer", _text),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_LLAMA, sliding_window=4), "MistralDecoderLayer", _text),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**_LLAMA, num_local_experts=2, num_experts_per_tok=1),
        "MixtralDecoderLayer",
        _text,
    ),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**_LLAMA), "GemmaDecoderLayer", _text),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**_LLAMA, sliding_window=4), "Gemma2DecoderLayer", _text),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_LLAMA, sliding_window=4), "Gemma3DecoderLayer", _text),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig(**_LLAMA, logit_scale=0.25), "CohereDecoderLayer", _text),
    "cohere2": (
        hf.Cohere2ForCausalLM,
        hf.Cohere2Config(**_LLAMA, logit_scale=0.25, sliding_window=4),
        "Cohere2DecoderLayer",
        _text,
    ),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig(**_LLAMA, logits_scaling=4.0), "GraniteDecoderLayer", _text),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**_LLAMA), "SmolLM3DecoderLayer", _text),
    "mamba2": (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=DEPTH,
            state_size=4,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=4,
        ),
        "Mamba2Block",
        _text,
    ),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(**_LLAMA), "Phi3DecoderLayer", _text),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=32,
            d_kv=8,
            d_ff=36,
            num_layers=DEPTH,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "T5Block",
        _text_pair,
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**_BART), "BartEncoderLayer", _text_pair),
    "bert-to-bert": (  # its decoder is a whole language model: rows are picked after the head
        hf.EncoderDecoderModel,
        hf.EncoderDecoderConfig.from_encoder_decoder_configs(
            hf.BertConfig(**_BERT), hf.BertConfig(**_BERT | {"num_hidden_layers": 2})
        ),
        "BertLayer",
        _text_pair,
    ),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig(**_WHISPER), "WhisperEncoderLayer", _speech_pair),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_VIT), "ViTLayer", _image),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**_VIT), "DeiTLayer", _image),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**_VIT), "Dinov2Layer", _image),
    "clip": (
        hf.CLIPForImageClassification,
        hf.CLIPConfig(vision_config=_VIT, num_labels=3),
        "CLIPEncoderLayer",
        _image,
    ),
    "siglip": (
        hf.SiglipForImageClassification,
        hf.SiglipConfig(vision_config=_VIT, num_labels=3),
        "SiglipEncoderLayer",
        _image,
    ),
    "wav2vec2": (
        hf.Wav2Vec2ForSequenceClassification,
        hf.Wav2Vec2Config(**_SPEECH),
        "Wav2Vec2EncoderLayer",
        _audio,
    ),
    "hubert": (hf.HubertForSequenceClassification, hf.HubertConfig(**_SPEECH), "HubertEncoderLayer", _audio),
}


def build(name, seed=0):
    """The model in training mode, the class name of its blocks, and a batch; all the same on every call."""
    model_class, config, block, batch = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = model_class(copy.deepcopy(config))  # models write into theirs: no test depends on those before it
    return model.train(), block, batch(model)
