"""Every head of transformers, tiny: models, batches and what training must do with them; see test_heads.py.

`python tests/heads.py` tries all of them and writes docs/heads.md.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PrinterCallback
from transformers.models.auto import modeling_auto

import hf_curriculum_distill
from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.layers import heads as library_heads

SECONDS = 20  # for one head, models and training
MAX_PARAMETERS = 20_000_000
UNLABELLED = "without a label term"


@dataclass(frozen=True)
class Head:
    """A model type and one of the classes that `AutoModelFor...` makes of it."""

    model_type: str
    class_name: str
    tasks: tuple[str, ...] = ()
    variant: str | None = None  # a problem type of classifiers, or "without a label term"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.model_type, self.class_name, self.variant)))

    @property
    def task(self) -> str:
        """The narrowest one."""
        broad = ("PreTraining", "MultimodalLM", "TextEncoding")
        return min(self.tasks, key=lambda task: (any(name in task for name in broad), task))


def all_heads() -> list[Head]:
    tasks = defaultdict(list)
    for name, auto in sorted(vars(modeling_auto).items()):
        if name.startswith("AutoModelFor") and getattr(auto, "_model_mapping", None) is not None:
            for model_type, classes in auto._model_mapping._model_mapping.items():
                for class_name in [classes] if isinstance(classes, str) else classes:
                    tasks[model_type, class_name].append(name)
    heads = [Head(*key, tuple(names)) for key, names in sorted(tasks.items())]
    variants = {"SequenceClassification": ("multi_label_classification", "regression"), "CTC": (UNLABELLED,)}
    return heads + [
        replace(head, variant=variant)
        for head in heads
        for what, several in variants.items()
        for variant in several
        if what in head.class_name
    ]


# ---- tiny models ----

VOCAB_SIZE, WIDTH, DEPTH, HEADS, HEAD_DIM, CLASSES = 100, 32, 2, 4, 8, 3

_LAYERS = r"layers|layer$|^depth$|num_blocks|_depth$"
# what a number of a configuration becomes, by its name: the first match decides, and a smaller number stays
_SIZES = {
    r"encoder_stride": 8,
    r"kernel|stride|ratio|padding|factor|dilation|_cost|coefficient|ignore|^scale|theta|^num_channels$": None,
    r"num_feat_extract|mamba_expand|^max_depth$|^num_codevector_groups$|num_convs$|type_vocab|_rate$": None,
    r"^(in|input|num)_(channels|chans)$": None,
    r"pos_embeddings$|n_mels|num_mel|mel_dim|window": 8,
    r"pos_embedding_groups|num_groups$|^groups|upsample_groups": 2,
    r"codebook_size|codebook_dim|num_centroids": 64,
    r"mamba_.*heads": 2 * HEADS,
    r"vocab|num_embeddings|codevectors_per_group": VOCAB_SIZE,
    r"num_queries|num_query_tokens|num_latents|context_size": 8,
    r"mm_tokens_per_image": 4,
    r"max_.*(position|len)|n_positions|n_ctx|context_length|max_seq|position_embedding_size|pos_size": 64,
    r"image_size|img_size|train_size|^resolution$|^input_size$": 32,
    r"patch_size|^patch_sizes$": 8,
    r"key_heads": 2,
    r"heads|n_head|kv_groups|query_groups": HEADS,
    r"^rotary_dim$": 4,
    r"qk_head_dim": 2 * HEAD_DIM,
    r"head_?dim|d_kv|d_head|dim_head|head_size|dim_per_head": HEAD_DIM,
    r"n_group$|topk_group|shared_experts|expert_group": 1,
    r"experts_per|top_?k$|moe_k": 2,
    r"experts": 4,
    r"intermediate|ffn|d_ff|mlp|feed_?forward|inner|dff|dim_ff|linear_units": 36,
    _LAYERS: DEPTH,
    r"depths|num_stages|blocks_per_stage|block_repeats": DEPTH,
    r"lora_rank|_rank$": 16,
    r"state_size|d_state|chunk|sliding|num_labels|n_relations": 8,
    r"hidden|d_model|embd|embed|emb_|emb$|dim|width|channels|projection|feature|filters|proj_|output_size|units|d_"
    r"|bottleneck": WIDTH,
}
_SPECIAL = re.compile(r"(token_id|token_index|(^|_)(bos|eos|pad|sep|cls|mask|unk)(_id|_index|_token)|blank_id)s?$")
_FIRST_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
_FIXED = {
    "output_router_logits": True,  # with them a mixture of experts adds an auxiliary loss
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
    "mrope_section": [2, 1, 1],  # half of a head
    "use_cache": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}
_MISSING = {  # where the default is None
    "vocab_size": VOCAB_SIZE,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_DERIVED = ("id2label", "label2id", "per_layer_config", "out_features", "out_indices", "stage_names")

_ROPE_OF_A_PART = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE = {
    "text_config": {"rope_parameters": _ROPE_OF_A_PART | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}}
}
_FOUR_STAGES = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_TWO_STAGES = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_WINDOW = {"vision_config": {"window_size": 32}}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16] * 4, "depths": [1] * 4}
_RESNET = {"backbone_config": _RESNET | {"layer_type": "basic", "out_features": ["stage4"]}, "use_timm_backbone": False}
# what no rule gives
_OVERRIDES: dict[str, dict[str, Any]] = {
    "beit": _FOUR_STAGES,
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE_OF_A_PART}},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "data2vec-vision": _FOUR_STAGES,
    "deformable_detr": _RESNET | {"num_feature_levels": 1},
    "detr": _RESNET,
    "donut-swin": _TWO_STAGES,
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm46v": _ROPE,
    "glm4v": _ROPE,
    "glm4v_moe": _ROPE,
    "glm_ocr": _ROPE,
    "glmga": _ROPE,
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["full_attention"] * DEPTH},
    "lilt": {"hidden_size": 48},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "mamba2": {"num_heads": 8},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 256,
        "max_xpath_subs_unit_embeddings": 1024,
        "tag_pad_id": 216,
        "subs_pad_id": 1001,
    },
    "mistral4": {"head_dim": 16},
    "mobilevitv2": {"image_size": 64},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "qwen2_5_omni_thinker": _ROPE | _WINDOW,
    "qwen2_5_vl": _ROPE | _WINDOW,
    "qwen2_vl": _ROPE,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4]},
    "swin": _TWO_STAGES,
    "swinv2": _TWO_STAGES,
    "table-transformer": _RESNET,
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_head_dim": 16},
}


def _size(name: str, value: int, depth: int) -> int:
    target = next((target for pattern, target in _SIZES.items() if re.search(pattern, name)), None)
    if target == HEADS and value == 3:
        return 2  # which divides the width
    if target == DEPTH and re.search(_LAYERS, name):
        target = depth
    return value if target is None else min(value, target)


def _shrink(config: Mapping[str, Any], tokens: dict[str, int], depth: int = DEPTH) -> dict[str, Any]:
    """A configuration as a dict, made tiny; `tokens` gives each special token a number of its own."""
    blocks = next((config[n] for n in ("depths", "num_hidden_layers", "n_layer", "num_layers") if n in config), None)
    small = {}
    for name, value in config.items():
        name = str(name)
        kind = type(value[0]) if isinstance(value, list | tuple) and value else type(value)
        if name in _DERIVED:
            continue
        if value is None:
            value = _MISSING.get(name)
        elif name in _FIXED:
            value = _FIXED[name]
        elif isinstance(value, dict):
            # another depth, so that a model of two modalities has one stack of blocks of its main depth
            value = _shrink(value, tokens, DEPTH + bool(re.search("vision|audio|encoder|image|speech", name)))
        elif isinstance(value, list | tuple) and len(value) == blocks and blocks > depth:
            value = [*value[: depth - 1], value[-1]]
        elif kind is float and ("drop" in name or "jitter" in name):
            value = [0.0] * len(value) if isinstance(value, list | tuple) else 0.0
        elif kind is int and _SPECIAL.search(name):
            token = _FIRST_TOKENS.get(name)
            token = tokens.setdefault(name, VOCAB_SIZE - 1 - len(tokens)) if token is None else token
            value = [token] if isinstance(value, list) else token
        elif kind is int and isinstance(value, list | tuple):
            value = [_size(name, item, depth) if type(item) is int else item for item in value]
        elif kind is int:
            value = _size(name, value, depth)
        small[name] = value
    kv, heads = "num_key_value_heads", "num_attention_heads"
    if isinstance(config.get(kv), int):
        small[kv] = min(small[kv], small[heads] if config[kv] == config.get(heads) else 2)
    return small


def _merge(config: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    changed = {n: _merge(config.get(n) or {}, v) if isinstance(v, Mapping) else v for n, v in other.items()}
    return config | changed


def tiny_config(head: Head) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[head.model_type]
    small = _merge(_shrink(config_class().to_dict(), {}), _OVERRIDES.get(head.model_type, {}))
    classes = 2 if "QuestionAnswering" in head.class_name else CLASSES
    small |= {"num_labels": 1 if head.variant == "regression" else classes}
    if head.variant not in (None, UNLABELLED):
        small["problem_type"] = head.variant
    if "WithLMHead" in head.class_name or "ForCausalLM" in head.class_name:
        small |= {"is_decoder": True} if small.get("is_decoder") is False else {}
    config = config_class(**small)
    for name, token in _FIRST_TOKENS.items():
        if getattr(config, name, None) is None and (name != "decoder_start_token_id" or config.is_encoder_decoder):
            setattr(config, name, token)
    return config


def build(head: Head, seed: int) -> PreTrainedModel:
    """A tiny model with opinions and without dropout."""
    model_class, config = getattr(transformers, head.class_name), tiny_config(head)
    config = next((part for part in _parts(config) if isinstance(part, model_class.config_class)), config)
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in model_class(config).named_parameters()}
    if sum(sizes.values()) > MAX_PARAMETERS:
        raise MemoryError(f"{sum(sizes.values()):,} parameters, most of them in {max(sizes, key=sizes.get)}")
    torch.manual_seed(seed)
    model = model_class(config)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    with torch.no_grad():  # a plain initialisation gives nearly the same logits everywhere
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1:
                parameter.mul_(4)
    return model


# ---- batches ----

BATCH, LENGTH, CHOICES, TOKENS, SAMPLES = 3, 16, 2, 30, 6400
MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [11], [6]])).long()

Batch = dict[str, Any]


def _integers(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _reals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text() -> Batch:
    input_ids = torch.where(MASK.bool(), _integers(TOKENS, BATCH, LENGTH, low=3), 0)
    input_ids[torch.arange(BATCH), MASK.sum(1) - 1] = _FIRST_TOKENS["eos_token_id"]  # some classifiers read this one
    return {"input_ids": input_ids, "attention_mask": MASK}


def _number(config: PreTrainedConfig, *names: str, default: int | None = None) -> int | None:
    """A configuration's or one of its parts' number."""
    found = (getattr(part, name, None) for part in _parts(config) for name in names)
    return next((number for number in found if type(number) is int), default)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [config, *(p for part in vars(config).values() if isinstance(part, PreTrainedConfig) for p in _parts(part))]


def _inputs(model: PreTrainedModel, task: str) -> Iterator[Batch]:
    """Inputs that a model may take, the fullest first."""
    config, names = model.config, inspect.signature(model.forward).parameters
    size = _number(config, "image_size", default=32)
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    pixels = _reals(BATCH, channels, size, size)
    if "MultipleChoice" in task:
        yield {name: tensor[:, None].repeat(1, CHOICES, 1) for name, tensor in _text().items()}
        return
    if "input_ids" in names:
        if "pixel_values" in names:
            yield from _texts_with_image_tokens(config, names, pixels)
            yield _text() | {"pixel_values": pixels}
        if "bbox" in names:
            yield _text() | {"bbox": _integers(8, BATCH, LENGTH, 1).repeat(1, 1, 4)}
        yield _text()
        yield {"input_ids": _text()["input_ids"]}
    if "pixel_values" in names:
        yield {"pixel_values": pixels}
        frames = _number(config, "num_frames", "frames_per_clip", default=8)
        yield {"pixel_values": _reals(BATCH, frames, channels, size, size)}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": _reals(BATCH, 8, channels, size, size)}
    mels = ("feature_projection_input_dim", "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel")
    mels = _number(config, *mels, "input_dim", default=80)
    if "input_values" in names:
        mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [SAMPLES - 800], [SAMPLES - 1200]])).long()
        if "attention_mask" in names:
            yield {"input_values": _reals(BATCH, SAMPLES) * mask, "attention_mask": mask}
        for shape in ((SAMPLES,), (1, SAMPLES), (_number(config, "max_length", default=64), mels), (64, mels)):
            yield {"input_values": _reals(BATCH, *shape)}
    if "input_features" in names:
        frames = 2 * _number(config, "max_source_positions", default=64)
        mask = (torch.arange(frames) < torch.tensor([[frames], [frames // 2], [frames // 4]])).long()
        for shape in ((mels, frames), (frames, mels), (frames, 2 * mels)):
            features = {"input_features": _reals(BATCH, *shape)}
            if "attention_mask" in names:
                yield features | {"attention_mask": mask}
            yield features
    if "inputs" in names:
        yield {"inputs": _text()["input_ids"], "attention_mask": MASK}
        yield {"inputs": pixels}


def _texts_with_image_tokens(config: PreTrainedConfig, names: Mapping[str, Any], pixels: Tensor) -> Iterator[Batch]:
    """Text after `n` tokens that stand for its image, for several `n`; only the model knows which is right."""
    token = _number(config, "image_token_id", "image_token_index")
    if token is None:
        return
    images: Batch = {"pixel_values": pixels}
    if "image_grid_thw" in names:
        patch = pixels.shape[1] * _number(config, "temporal_patch_size", default=1)
        patch *= _number(config, "patch_size", default=8) ** 2
        images = {"pixel_values": _reals(BATCH * 16, patch), "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}
    for count in (1, 2, 4, 8, 9, 16, 17, 32):
        prefix = torch.full((BATCH, count), token)
        input_ids = torch.cat([prefix, _text()["input_ids"]], 1)
        batch = {"input_ids": input_ids, "attention_mask": torch.cat([torch.ones_like(prefix), MASK], 1)} | images
        yield batch | ({"mm_token_type_ids": (input_ids == token).long()} if "mm_token_type_ids" in names else {})


def _labels(model: PreTrainedModel, head: Head, inputs: Batch) -> Iterator[Batch]:
    """Labels that a model may take beside these inputs, the likeliest first."""
    config, names = model.config, inspect.signature(model.forward).parameters
    what, classes = head.task + head.class_name, _integers(CLASSES, BATCH)
    size = _number(config, "image_size", default=32)
    if head.variant == "regression":
        yield {"labels": _reals(BATCH)}
    elif head.variant == "multi_label_classification":
        yield {"labels": F.one_hot(classes, CLASSES).float()}
    if "start_positions" in names:
        yield {"start_positions": torch.tensor([1, 3, 2]), "end_positions": torch.tensor([4, 5, 3])}
    if "MultipleChoice" in what or "NextSentence" in what:
        yield {"labels": classes % 2}
    if "mask_labels" in names:
        masks = [torch.ones(2, size, size)] * BATCH
        yield {"class_labels": [torch.tensor([0, 1])] * BATCH, "mask_labels": masks}
    if "bool_masked_pos" in names and "MaskedImage" in what:
        yield from ({"bool_masked_pos": _integers(2, BATCH, patches).bool()} for patches in (4, 16, 64, 256))
    if "labels" not in names:
        yield {}
        return
    if re.search("Detection|Segmentation", what):
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.4, 0.3, 0.2, 0.2]])
        objects = {"class_labels": torch.tensor([0, 1]), "boxes": boxes}
        yield {"labels": [objects for _ in range(BATCH)]}
        yield {"labels": [objects | {"masks": torch.ones(2, size, size)} for _ in range(BATCH)]}
        yield {"labels": _integers(CLASSES, BATCH, size, size)}
    if "FrameClassification" in what:
        yield from ({"labels": F.one_hot(_integers(CLASSES, BATCH, frames), CLASSES)} for frames in (19, 20, 10, 64))
    elif re.search("(Sequence|Image|Audio|Video)Classification|XVector", what):
        yield {"labels": classes}
    beside = dict.fromkeys({"next_sentence_label", "sentence_order_label"} & names.keys(), classes % 2)
    input_ids = inputs.get("input_ids", inputs.get("inputs"))
    encodes_decodes = getattr(config, "is_encoder_decoder", False)
    if input_ids is not None and not input_ids.is_floating_point() and not encodes_decodes:
        # neither padding nor images, and only some
        counted = (input_ids < TOKENS) & (input_ids > 2) & (_integers(4, *input_ids.shape) > 0)
        labels = input_ids % CLASSES if "TokenClassification" in what else input_ids
        yield {"labels": torch.where(counted, labels, -100)} | beside
    labels = _integers(TOKENS, BATCH, 7, low=3)
    yield {"labels": torch.where(torch.arange(7) < torch.tensor([[7], [5], [3]]), labels, -100)} | beside
    yield {"labels": labels} | beside
    yield {"labels": classes}
    yield {}


def batch_of(model: PreTrainedModel, head: Head) -> Batch:
    """The first batch that the stock model takes and computes a loss from, else the first that it takes."""
    accepted, errors = None, []
    for inputs in _inputs(model, head.task):
        for labels in _labels(model, head, inputs):
            try:
                with torch.no_grad():
                    loss = Outputs.of(model, inputs | labels).loss
            except TimeoutError:
                raise
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if loss is not None:
                return inputs | labels
            accepted = accepted or inputs | labels
    if accepted is None:
        raise LookupError(f"the model takes no batch: {errors[0] if errors else 'none to try'}")
    return accepted


def clone(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: clone(value) for name, value in batch.items()}
    return [clone(value) for value in batch] if isinstance(batch, list) else batch.clone()


class SameBatch:
    """A collator that makes one and the same batch of whatever it is given."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __call__(self, examples: list) -> Batch:
        return clone(self.batch)


# ---- what is right ----


@dataclass
class Outputs:
    """What the stock model makes of a batch."""

    loss: float | None
    logits: Tensor | None
    auxiliary: float

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch) -> Outputs:
        outputs = model(**clone(batch))
        outputs = outputs if isinstance(outputs, Mapping) else {}
        loss, logits, auxiliary = (outputs.get(name) for name in ("loss", "logits", "aux_loss"))
        names = ("router_aux_loss_coef", "aux_loss_coef")
        coefs = [getattr(part, name, None) for part in _parts(model.config) for name in names]
        coef = next((coef for coef in coefs if coef is not None), 0.0)
        return cls(
            loss.mean().item() if isinstance(loss, Tensor) else None,
            logits.float() if isinstance(logits, Tensor) else None,
            coef * auxiliary.item() if isinstance(auxiliary, Tensor) else 0.0,
        )


@dataclass
class Rows:
    """Which rows of logits a loss is over: found by what gives back the model's own."""

    picked: Tensor  # [batch, length], a mask on the logits
    labels: Tensor | None = None  # [rows]
    auxiliary: float = 0.0


def counted_rows(model: PreTrainedModel, batch: Batch, outputs: Outputs) -> Rows | None:
    """None where the model's own loss is no cross-entropy of the batch's labels, or its outputs are numbers."""
    labels, logits = batch.get("labels"), outputs.logits
    if logits is None or library_heads.head_of(model).predicts_numbers:
        return None
    if labels is None:
        mask = batch.get("attention_mask")
        per_token = mask is not None and mask.shape == logits.shape[:-1]
        return Rows(mask.bool() if per_token else torch.ones(logits.shape[:-1], dtype=torch.bool))
    if "CTC" in type(model).__name__ and logits.dim() == 3:
        mask = batch.get("attention_mask")
        if mask is None or not hasattr(model, "_get_feat_extract_output_lengths"):
            return Rows(torch.ones(logits.shape[:2], dtype=torch.bool))
        frames = model._get_feat_extract_output_lengths(mask.sum(1))
        return Rows(torch.arange(logits.shape[1]) < frames[:, None])
    if outputs.loss is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    if logits.dim() != labels.dim() + 1:
        return None
    found = []
    before = 0 if labels.dim() == 1 else logits.shape[1] - labels.shape[1]  # rows of an image before the text's
    for shift in (0, 1)[: labels.dim()]:
        placed = F.pad(labels[..., shift:], (before, shift), value=-100) if labels.dim() > 1 else labels
        if placed.shape != logits.shape[:-1] or placed.max() >= logits.shape[-1]:
            continue
        entropy = F.cross_entropy(logits.flatten(0, -2), placed.flatten()).item()
        for auxiliary in {0.0, outputs.auxiliary}:
            if abs(entropy + auxiliary - outputs.loss) < 1e-5 * max(1.0, abs(outputs.loss)):
                picked = placed != -100
                found.append(Rows(picked, placed[picked], auxiliary))
    if not found and labels.dim() == 1:  # another loss with one row of logits for each example
        return Rows(torch.ones(len(labels), dtype=torch.bool), labels)
    return found[0] if len(found) == 1 else None


def divergence(student: Tensor, teacher: Tensor) -> float:
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


def expected(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> dict[str, float] | None:
    """The values of a batch by hand, from what the stock models return; None where no rows belong to its labels."""
    with torch.no_grad():
        own, theirs = Outputs.of(student, batch), Outputs.of(teacher, batch)
    rows = counted_rows(student, batch, own)
    if rows is None or theirs.logits is None or theirs.logits.shape != own.logits.shape:
        return None
    logits, targets = own.logits[rows.picked], theirs.logits[rows.picked]
    values = {"kl": divergence(logits, targets)}
    values["agreement"] = (logits.argmax(-1) == targets.argmax(-1)).float().mean().item()
    if rows.labels is not None:
        values["accuracy"] = (logits.argmax(-1) == rows.labels).float().mean().item()
    if own.loss is not None:
        values |= {"label_loss": own.loss, "auxiliary": rows.auxiliary}
    return values


# ---- trying a head ----


OUTCOMES = ("trains", "refused", "not tried", "FAULT")


@dataclass
class Verdict:
    head: Head
    outcome: str
    reason: str = ""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(head: Head, folder: str | os.PathLike) -> Verdict:
    """Train and evaluate a tiny model of this class, taught by another one, and compare with values by hand."""
    try:
        with time_limit(SECONDS):
            try:
                student, teacher = build(head, seed=1).train(), build(head, seed=2).eval()
                batch = batch_of(student, head)
                values = expected(copy.deepcopy(student), teacher, batch)
            except TimeoutError:
                raise
            except Exception as error:
                return Verdict(head, "not tried", f"{type(error).__name__}: {' '.join(str(error).split())}")
            return _train(head, student, teacher, batch, values, folder)
    except TimeoutError as error:
        return Verdict(head, "not tried", str(error))


def _train(
    head: Head,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    training: dict[str, float] | None,
    folder: str | os.PathLike,
) -> Verdict:
    label_weight = 0.5 if "labels" in batch and head.variant != UNLABELLED else 0.0
    args = CurriculumDistillationConfig(
        str(folder),
        stages=[{"hidden": [[1, 1]], "until": 1}, {"kl_weight": 1.0, "label_weight": label_weight}],
        max_steps=2,
        learning_rate=0.0,  # the weights stay as they are
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"example": torch.tensor(index)} for index in range(BATCH)]
    trainer = None
    try:
        trainer = CurriculumDistillationTrainer(student, args, SameBatch(batch), data, data, teacher_model=teacher)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    except TimeoutError:
        raise
    except Exception as error:
        step = 0 if trainer is None else trainer.state.global_step
        sentence, ours = _sentence(error)
        if ours and step == 0:
            return Verdict(head, "refused", sentence)
        return Verdict(head, "FAULT", f"{'an error' if ours else 'a foreign error'} after step {step}: {sentence}")
    if training is None and library_heads.head_of(student) is not library_heads.CLASSES:
        return Verdict(head, "trains", "test_rows.py computes its loss by hand")
    if training is None:
        return Verdict(head, "FAULT", "it trains, but its own loss is no cross-entropy of the labels")
    logs = [log for log in trainer.state.log_history if "loss" in log][-1]
    right = {"kl": training["kl"], "loss": training["kl"]}
    if label_weight:
        separate = any("aux" in name for name in logs)
        right["label_loss"] = training["label_loss"] - separate * training["auxiliary"]
        right["loss"] += label_weight * training["label_loss"]
    if "labels" in batch:
        evaluation = expected(student.eval(), teacher, batch)
        names = {"label_loss": "eval_loss"} | {name: f"eval_{name}" for name in ("kl", "agreement", "accuracy")}
        right |= {name: evaluation[key] for key, name in names.items() if key in evaluation}
    actual = logs | {name: value for name, value in metrics.items() if name.startswith("eval_")}
    wrong = [
        f"{name} is {actual.get(name)} instead of {value:.5f}"
        for name, value in right.items()
        if name not in actual or not abs(actual[name] - value) < 2e-4 * max(1.0, abs(value))
    ]
    alone = "" if "labels" in batch else "KL alone, for the stock model computes no loss from such a batch"
    return Verdict(head, "FAULT" if wrong else "trains", "; ".join(wrong) or alone)


def _sentence(error: BaseException) -> tuple[str, bool]:
    """What an error says, and whether this library says it, as a user's mistake."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    while error.__cause__ is not None:
        error = error.__cause__
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    inside = Path(hf_curriculum_distill.__file__).parent in where.parents
    return (said if inside else f"{said} ({where.name})"), inside and isinstance(error, ValueError | OSError)


# ---- the table ----


def _try(head: Head) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        return judge(head, folder)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)


def table(verdicts: list[Verdict]) -> str:
    """The sweep as Markdown."""
    tasks = defaultdict(list)
    for verdict in verdicts:
        for task in verdict.head.tasks:
            tasks[task].append(verdict)
    lines = [
        f"# Every head of transformers {transformers.__version__}",
        "",
        "Written by `python tests/heads.py`. A tiny student of each class that an `AutoModelFor...` makes learns from",
        "a teacher of the same class: one step of hidden states, one of KL and labels, one evaluation. It *trains* if",
        "KL, label term and evaluation equal a computation by hand from the loss and the logits that the model itself",
        "returns, or it is *refused* before the first step. *Not tried*: a tiny model or a batch for it needs more",
        "than the rules of `tests/heads.py`, or a package that is not installed. Classifiers of sequences are tried",
        "three times, with one label, many labels and a number, and CTC heads with and without a label term. Where a",
        'head is refused for its logits or its labels, `method="hidden"` matches hidden states alone.',
        "",
        "| task | trains | refused | not tried | fault |",
        "|---|---|---|---|---|",
    ]
    for task, found in sorted(tasks.items()):
        counts = Counter(verdict.outcome for verdict in found)
        lines.append(f"| {task} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |")
    counts = Counter(verdict.outcome for verdict in verdicts)
    lines.append("| all, each head once | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |")
    for task, found in sorted(tasks.items()):
        lines += ["", f"## {task}", "", "| outcome | model types |", "|---|---|"]
        groups = defaultdict(list)
        for verdict in found:
            says = f": {_general(verdict)}" if verdict.reason else ""
            kind = f" ({verdict.head.variant})" if verdict.head.variant else ""
            groups[OUTCOMES.index(verdict.outcome), verdict.outcome + says].append(verdict.head.model_type + kind)
        lines += [f"| {outcome} | {', '.join(sorted(names))} |" for (_, outcome), names in sorted(groups.items())]
    return "\n".join(lines) + "\n"


def _general(verdict: Verdict) -> str:
    """A sentence without what differs from model to model."""
    said = re.sub(r"^(ValueError|OSError): ", "", verdict.reason).replace("|", "/")
    said = said.replace("][", "]\\[")  # else Markdown makes a link of it
    said = re.sub(rf"\b({verdict.head.class_name}|(?!AutoModel)[A-Z]\w*(For[A-Z]|Model\b|LMHead)\w*)", "...", said)
    said = re.sub(r"(but has: ).*?(\. Models)", r"\1...\2", said)
    said = re.sub(r"(?<![\w.])-?\d+(\.\d+)?(e-\d+)?", "n", said)
    return said if len(said) < 320 else said[:300] + " ..."


def main() -> None:
    chosen = [head for head in all_heads() if not sys.argv[1:] or re.search(sys.argv[1], str(head))]
    with get_context("spawn").Pool(2, _start) as pool:
        verdicts = []
        for verdict in pool.imap(_try, chosen):
            verdicts.append(verdict)
            if sys.argv[1:] or verdict.outcome == "FAULT":
                print(f"{verdict.head}: {verdict.outcome} {verdict.reason}", flush=True)
    if not sys.argv[1:]:
        Path(__file__).parents[1].joinpath("docs/heads.md").write_text(table(verdicts))


if __name__ == "__main__":
    main()
