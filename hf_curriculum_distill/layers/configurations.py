"""The configuration of a student that is made from its teacher: fewer blocks, or another width."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedConfig

from hf_curriculum_distill.stages import resolve_layer_map

_DEPTHS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_PER_BLOCK = re.compile(r"layer|block|attention_window")  # in the names of lists that have an entry for each block
_INNER_WIDTHS = re.compile(
    r"intermediate_size|ffn_dim|ffn_hidden_size|^d_ff$|^n_inner$|^hidden_dim$|bottleneck_size|true_hidden"
)
_OUTER_WIDTHS = re.compile(r"^(embedding_size|word_embed_proj_dim|pooler_output_size|output_hidden_size)$")
_HEADS = re.compile(r"^(num_heads|n_heads?|(num|encoder|decoder)_attention_heads|num_(en|de)coder_attention_heads)$")
_KEY_HEADS = re.compile(r"^num_(key_value|kv)_heads$")


def student_size(name: str) -> tuple[int, int | None] | None:
    """The number of blocks and the hidden size (None: the teacher's) of a student that is named after its teacher.

    Returns:
        `(blocks, hidden size)`; None if the name is no such name, or a file or folder has it.

    ```python
    >>> student_size("teacher-6"), student_size("teacher-6-192"), student_size("bert-6-192")
    ((6, None), (6, 192), None)

    ```
    """
    size = re.fullmatch(r"teacher-(\d+)(?:-(\d+))?", name)
    if size is None or os.path.exists(name):
        return None
    num_layers, hidden_size = size.groups()
    return int(num_layers), int(hidden_size) if hidden_size else None


def choose_layers(layers: str | Sequence[int], num_layers: int, depth: int, whose: str = "the teacher") -> list[int]:
    """The numbers of the teacher's blocks that become the student's blocks, in order.

    Args:
        layers, num_layers: see [`student_from_teacher`].
        depth: the number of the teacher's blocks.
        whose: the model or stack, as an error names it.

    Raises:
        ValueError: there are not as many blocks, or the numbers are not `num_layers` increasing ones from 1 to `depth`.

    ```python
    >>> [choose_layers(layers, 3, depth=7) for layers in ("uniform", "lowest", "last", [1, 2, 7])]
    [[3, 5, 7], [1, 2, 3], [5, 6, 7], [1, 2, 7]]

    ```
    """
    if not is_whole(num_layers) or not 1 <= num_layers <= depth:
        raise ValueError(
            f"num_layers is {num_layers!r}, but {whose} has {depth} blocks; use a whole number from 1 to {depth}."
        )
    if layers == "lowest":
        return [*range(1, num_layers + 1)]
    if layers in ("uniform", "last"):
        return [number for _, number in resolve_layer_map(layers, None, num_layers, depth)]
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(map(is_whole, layers)):
        raise ValueError(f"layers is {layers!r}; use 'uniform', 'lowest', 'last', or a list of block numbers from 1.")
    if len(layers) != num_layers:
        raise ValueError(f"layers names {len(layers)} blocks, but num_layers is {num_layers}; they must agree.")
    if any(lower >= upper for lower, upper in pairwise([0, *layers, depth + 1])):
        raise ValueError(
            f"layers is {list(layers)}, but the blocks of {whose} are numbered from 1 to {depth}; name each at "
            "most once, in increasing order."
        )
    return list(layers)


def student_config(
    config: PreTrainedConfig,
    num_layers: int,
    layers: str | Sequence[int] = "uniform",
    hidden_size: int | None = None,
    stack: str | None = None,
    main_input: str = "input_ids",
) -> PreTrainedConfig:
    """The configuration of the student that [`student_from_teacher`] makes.

    Args:
        config: the teacher's. It stays as it is.
        main_input: the name of the teacher's main input, which tells the part of a multimodal configuration.

    Raises:
        ValueError: the configuration names no number of blocks or too few, a layer is out of range or named twice,
            neither the heads' width nor their number divides the hidden size, or the family refuses the sizes.
    """
    if hidden_size is not None and (not is_whole(hidden_size) or hidden_size < 1):
        raise ValueError(
            f"hidden_size is {hidden_size!r}; use a whole number of at least 1, or None for the teacher's."
        )
    config = copy.deepcopy(config)
    parts = {one: _part(config, one, main_input) for one in stacks_of(config, stack)}
    for one, part in parts.items():
        decodes = one == "decoder" or getattr(part, "is_decoder", False)
        names = [name for name in _DEPTHS["decoder" if decodes else "encoder"] if is_whole(getattr(part, name, None))]
        names = names or ["num_hidden_layers"]
        if not is_whole(depth := getattr(part, names[0], None)):
            raise ValueError(
                f"A {type(part).__name__} names no number of blocks, so no student can be made from it; make it from a "
                "configuration of yours."
            )
        chosen = choose_layers(layers, num_layers, depth, f"the teacher's {one}" if len(parts) > 1 else "the teacher")
        for name in names:
            setattr(part, name, num_layers)
        if num_layers < depth and (one == "encoder" or part is not parts.get("encoder")):
            _cut_lists(part, chosen, depth)
    if hidden_size is not None:
        for one in stacks_of(config, None):
            part = _part(config, one, main_input)
            if part.hidden_size != hidden_size:
                _scale(part, hidden_size)
    config.name_or_path = ""
    try:
        type(config).from_dict(config.to_dict())  # as a folder is read
    except Exception as error:  # of any kind: each family checks its fields as it likes
        raise ValueError(
            f"There is no {type(config).__name__} with num_layers={num_layers} and hidden_size={hidden_size} "
            f"({' '.join(str(error).split())}); choose other sizes, or make the student from a configuration of yours."
        ) from error
    return config


def stacks_of(config: PreTrainedConfig, stack: str | None) -> tuple[str, ...]:
    """The stack that is named, or all that a model has; a single stack counts as an encoder."""
    if stack not in (None, "encoder", "decoder"):
        raise ValueError(f"stack is {stack!r}; use 'encoder', 'decoder', or None for every stack.")
    if stack is not None:
        return (stack,)
    return ("encoder", "decoder") if getattr(config, "is_encoder_decoder", False) else ("encoder",)


def _part(config: PreTrainedConfig, stack: str, main_input: str) -> PreTrainedConfig:
    """The part of a configuration that describes a stack: for many encoder-decoders, one describes both."""
    if config.is_encoder_decoder and isinstance(getattr(config, stack, None), PreTrainedConfig):
        return getattr(config, stack)
    if main_input == "pixel_values":
        return getattr(config, "vision_config", config)
    return config.get_text_config()


def _cut_lists(config: PreTrainedConfig, chosen: Sequence[int], depth: int) -> None:
    """Keep the chosen blocks' entries of lists by block (`layer_types`), and of lists of block numbers from 0."""
    for name, values in list(vars(config).items()):
        if not _PER_BLOCK.search(name) or not isinstance(values, list):
            continue
        numbers = all(map(is_whole, values)) and set(values) <= {*range(depth)}
        if numbers and all(lower < upper for lower, upper in pairwise(values)):
            setattr(config, name, [chosen.index(value + 1) for value in values if value + 1 in chosen])
        elif len(values) == depth:
            setattr(config, name, [values[number - 1] for number in chosen])
    if {"attention_types", "attention_layers"} <= vars(config).keys():  # GPT-Neo works out the latter
        config.attention_types = [[config.attention_layers, 1]]
    if getattr(config, "out_indices", None):  # of a backbone
        if config.out_indices != [depth]:
            raise ValueError(
                f"The teacher's configuration has out_indices={config.out_indices}, so that features of {depth} blocks "
                "are read; a student with fewer can be made where only those of the last block are."
            )
        config.stage_names = config.stage_names[: len(chosen) + 1]
        config.out_indices = [len(chosen)]


def _scale(config: PreTrainedConfig, hidden_size: int) -> None:
    """Set the hidden size, and what follows from it: heads in proportion if they stay whole, so that the queries that
    share a key do, and feed-forward widths in proportion, rounded to a multiple of 8."""
    before, all_heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    fields = {name: value for name, value in vars(config).items() if is_whole(value)}
    has_head_dim = config.attribute_map.get("head_dim", "head_dim") in fields
    rotates = any(value for name, value in vars(config).items() if re.search("rope|rotary", name))
    for name, value in fields.items():
        if _INNER_WIDTHS.search(name):
            setattr(config, name, max(1, round(value * hidden_size / (8 * before))) * 8)
        elif _OUTER_WIDTHS.search(name) and value == before:
            setattr(config, name, hidden_size)
        elif _HEADS.search(name):
            heads, rest = divmod(value * hidden_size, before)
            if rest and not has_head_dim and (rotates or hidden_size % value):
                allowed = f"a multiple of {before // value}" + ("" if rotates else f" or of {value}")
                raise ValueError(
                    f"hidden_size is {hidden_size}, but the teacher has {value} heads of width {before // value}; use "
                    f"{allowed}, so that heads keep their width{'' if rotates else ' or their number'}."
                )
            setattr(config, name, value if rest else heads)
    for name, value in fields.items():
        if _KEY_HEADS.search(name):
            heads, group = config.num_attention_heads, all_heads // value  # as many queries share a key, or fewer
            setattr(config, name, math.gcd(heads, value) if heads % group else heads // group)
    config.hidden_size = hidden_size


def is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
