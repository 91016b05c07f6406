"""Students made from a teacher: some of its blocks, or a narrower model of its family."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_curriculum_distill.layers.adapted import is_quantised
from hf_curriculum_distill.layers.blocks import backbone_config, find_block_stack
from hf_curriculum_distill.layers.configurations import choose_layers, is_whole, stacks_of, student_config, student_size
from hf_curriculum_distill.projections import ProjectionBank

# attributes of a block's modules that do not change what the trained block computes
_OF_TRAINING = re.compile(r"_.*|training|gradient_checkpointing|p|.*drop.*")


def student_from_teacher(
    teacher: PreTrainedModel,
    num_layers: int,
    layers: str | Sequence[int] = "uniform",
    hidden_size: int | None = None,
    projection_bank: ProjectionBank | None = None,
    stack: str | None = None,
) -> PreTrainedModel:
    """Make a student of the teacher's class: a copy of some of its blocks, or a model of another width.

    At the teacher's width, embeddings, the chosen blocks, final norms and head are the teacher's to the bit, dtype and
    device included, and share no memory with it; with as many blocks, the student is the teacher. DistilBERT (Sanh et
    al., 2019, arXiv 1910.01108) starts from every second block. What a whole stack uses but one block holds, as block 1
    of T5 holds the relative positions, comes from there. `projection="identity"` gives such a student targets in the
    basis of its own states, a random projection in another.

    At another width, the student is randomly initialised, in the teacher's dtype. Its configuration is the teacher's
    with feed-forward layers in proportion, and with heads of the same width if their number stays whole, otherwise
    with as many heads.

    Args:
        teacher: a model with a stack of blocks ([`find_block_stack`]). It stays as it is.
        num_layers: the number of the student's blocks.
        layers: which of the teacher's `T` blocks the student gets: "uniform" (as block `i`, block
            `ceil(i * T / num_layers)`, so that the last is the teacher's last), "lowest", "last", or increasing numbers
            from 1. At another width, it only says which entries of lists like `layer_types` the configuration keeps.
        hidden_size: the width of the student's hidden states; None for the teacher's.
        projection_bank: at another width: the embeddings start as the teacher's, see [`project_embeddings`].
        stack: "encoder" or "decoder", the stack of an encoder-decoder that gets `num_layers` blocks, while the other
            keeps all of its own; None for both.

    Returns:
        the student, in evaluation mode.

    Raises:
        ValueError: the teacher is quantised, or has adapters, no stack of blocks or too few; a layer is out of range or
            named twice; blocks differ in kind, and a chosen one has no place at its new number; the family has no model
            of this width; or the bank does not fit.
    """
    _check_plain(teacher)
    stacks = stacks_of(teacher.config, stack)
    depths = {one: len(find_block_stack(teacher, one)) for one in stacks}
    width = backbone_config(teacher, stacks[0]).hidden_size
    copied = hidden_size in (None, width)
    if copied and projection_bank is not None:
        raise ValueError(
            f"A projection_bank is given, but the student is {width} wide as the teacher is, whose embeddings it gets "
            "as they are; give another hidden_size, or leave projection_bank out."
        )
    config = student_config(teacher.config, num_layers, layers, hidden_size, stack, teacher.main_input_name)
    config.dtype = teacher.dtype
    try:
        student = _without_values(type(teacher), config) if copied else type(teacher)(config)
        found = {one: len(find_block_stack(student, one)) for one in stacks}
    except Exception as error:  # of any kind: a family checks its sizes as it likes
        raise ValueError(
            f"There is no {type(teacher).__name__} with num_layers={num_layers} and hidden_size={hidden_size or width} "
            f"({' '.join(str(error).split())}); choose other sizes, or make the student from a configuration of yours."
        ) from error
    if set(found.values()) != {num_layers}:
        raise ValueError(
            f"The configuration of {type(teacher).__name__} does not say how many blocks it has: {found} instead of "
            f"num_layers={num_layers}; make the student from a configuration of yours."
        )
    for parameter in student.parameters():
        parameter.data = parameter.data.to(teacher.dtype)
    if copied:
        _copy_weights(student, teacher, {one: choose_layers(layers, num_layers, depths[one]) for one in stacks})
    elif projection_bank is not None:
        project_embeddings(student, teacher, projection_bank)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
        same_heads = copied and depths.get("decoder", num_layers) == num_layers
        if hasattr(student.generation_config, "alignment_heads") and not same_heads:
            del student.generation_config.alignment_heads  # heads of Whisper's decoder, by block
    return student.eval()


@torch.no_grad()
def project_embeddings(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    projection_bank: ProjectionBank,
    num_tokens: int | None = None,
) -> PreTrainedModel:
    """Set the student's embeddings to the teacher's, projected by the matrix that projects all of its hidden states.

    A table `[entries, teacher_dim]` of the teacher becomes `table @ W.T`, `[entries, student_dim]`, so that the student
    and its targets start in one basis. Word embeddings are projected, and all other tables as wide as the hidden states
    (positions, token types) that the student has under the same name, as far as both have entries. Where one model's
    positions begin at a later row, as RoBERTa's do, each position gets the same one's entry. Tables that are not
    trained, such as sinusoidal positions, stay.

    Args:
        student, teacher: of one vocabulary.
        projection_bank: with one `[student_dim, teacher_dim]` matrix for all of its pairs, as with `shared=True`. It
            need not be fitted, but for a PCA.
        num_tokens: of the tokenizer of both, if their vocabularies are padded to different sizes, which are refused
            otherwise; entries that only the student has stay.

    Returns:
        the student, changed in place.

    Raises:
        ValueError: the bank has a matrix for each layer, for models of other widths, or of a PCA that was not fitted;
            the vocabularies differ, or a model's embeddings are no table as wide as its hidden states.
    """
    words, widths = [], []
    for who, model in (("student", student), ("teacher", teacher)):
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:
            table = None
        width = backbone_config(model).hidden_size
        if not isinstance(table, nn.Embedding) or table.embedding_dim != width:
            raise ValueError(
                f"The {who} is a {type(model).__name__}, whose input embeddings are no table as wide as its hidden "
                f"states ({width}), so that the projection of hidden states does not fit them; leave projection_bank "
                "out."
            )
        words.append(table)
        widths.append(width)
    sizes = {table.num_embeddings for table in words}
    if len(sizes) > 1 and (num_tokens is None or num_tokens > min(sizes)):
        raise ValueError(
            f"The student's vocabulary has {words[0].num_embeddings} entries and the teacher's "
            f"{words[1].num_embeddings}, so that their embeddings are not of the same tokens; build the student with "
            "the teacher's tokenizer and vocab_size."
        )
    matrix = _shared_matrix(projection_bank, tuple(widths))
    theirs = dict(teacher.base_model.named_modules())
    tables = {words[0]: (words[1], 0)}
    for name, module in student.base_model.named_modules():
        if isinstance(module, nn.Embedding) and isinstance(theirs.get(name), nn.Embedding):
            fits = (module.embedding_dim, theirs[name].embedding_dim) == tuple(widths)
            if fits and module.weight.requires_grad:
                later = _first_position(theirs[name], teacher) - _first_position(module, student)
                tables.setdefault(module, (theirs[name], later))
    for table, (source, later) in tables.items():
        ours, entries = table.weight[max(0, -later) :], source.weight[max(0, later) :]
        rows = min(len(ours), len(entries))
        ours[:rows] = (entries[:rows].float() @ matrix.to(entries.device).T).to(ours)
    return student


def _first_position(table: nn.Embedding, model: PreTrainedModel) -> int:
    """The row of the first position in a table of positions; 0 for other tables."""
    if table.padding_idx is not None:  # RoBERTa's positions start after the one for padding
        return table.padding_idx + 1
    size = getattr(backbone_config(model), "max_position_embeddings", None)
    return 2 if size and table.num_embeddings == size + 2 else 0  # OPT and BART keep two more rows


def make_student(
    name: str,
    teacher: PreTrainedModel,
    layers: str | Sequence[int] = "uniform",
    projection_bank: ProjectionBank | None = None,
) -> PreTrainedModel:
    """Make the student that a name like `teacher-6` or `teacher-6-192` stands for.

    Args:
        name: `teacher-LAYERS`, or `teacher-LAYERS-HIDDEN` for another width: [`student_size`] tells whether it is.
        teacher, layers, projection_bank: see [`student_from_teacher`].

    Raises:
        ValueError: the name is no such name, or there is no such student.
    """
    if (size := student_size(name)) is None:
        raise ValueError(f"{name!r} names no student of a teacher; use teacher-LAYERS or teacher-LAYERS-HIDDEN.")
    num_layers, hidden_size = size
    return student_from_teacher(teacher, num_layers, layers, hidden_size, projection_bank)


def _check_plain(teacher: PreTrainedModel) -> None:
    if not isinstance(teacher, PreTrainedModel) or hasattr(teacher, "peft_config"):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}, but a student is made from a PreTrainedModel without adapters; "
            "load the model with from_pretrained, or pass a PEFT model's merge_and_unload()."
        )
    if is_quantised(teacher):
        raise ValueError(
            f"The {type(teacher).__name__} is quantised, so that a student could not train copies of its weights; load "
            "the teacher without quantisation."
        )


def _without_values(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with no_init_weights():
        model = model_class(config)
    model.tie_weights()
    return model


def _copy_weights(student: PreTrainedModel, teacher: PreTrainedModel, chosen: Mapping[str, list[int]]) -> None:
    """Copy all of a teacher's parameters and buffers but those of blocks that are not chosen."""
    ours, theirs = ({module: name for name, module in model.named_modules()} for model in (student, teacher))
    values, of_blocks = [_tensors(teacher), _computed(teacher)], []
    sources: dict[nn.Module, nn.Module] = {}
    for stack, numbers in chosen.items():
        blocks = find_block_stack(teacher, stack)
        prefixes = tuple(f"{theirs[block]}." for block in blocks)
        values = [{n: t for n, t in known.items() if not n.startswith(prefixes)} for known in values]
        for index, (block, number) in enumerate(zip(find_block_stack(student, stack), numbers, strict=True)):
            source = blocks[number - 1]
            if sources.setdefault(block, source) is not source or [*sources.values()].count(source) > 1:
                raise ValueError(
                    f"{type(teacher).__name__} runs one block for many layers, and a student with layers {numbers} "
                    "would run it for others; choose other layers, or another number of them."
                )
            # what a whole stack uses is in a block of a certain number, whichever block is chosen for it
            wanted, own = _tensors(block), _tensors(source)
            missing = {n: t for n, t in _tensors(blocks[index]).items() if n in wanted.keys() - own.keys()}
            of_blocks.append((f"{ours[block]}.", [missing | own, _computed(source)]))
            if changed := _changed(block, source, index + 1 - number, missing):
                raise ValueError(
                    f"Block {number} of the {type(teacher).__name__} would be another one as block {index + 1} "
                    f"({changed}); choose layers that keep each kind of block in its place, such as 'lowest' or a list "
                    "that starts with 1."
                )
    for prefix, of_block in of_blocks:
        for known, more in zip(values, of_block, strict=True):
            known |= {prefix + name: tensor for name, tensor in more.items()}
    _assign(student, *values)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is saved, tied parameters under each of their names."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not saved: they follow from the configuration, but have the dtype that the model was cast to."""
    saved = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in saved}


def _changed(block: nn.Module, source: nn.Module, moved: int, missing: Collection[str]) -> str | None:
    """What a block of the student computes otherwise than the teacher's that it is made from; None if nothing.

    Args:
        moved: the block's number minus its source's.
        missing: names of tensors that the source does not have: modules that hold them are not compared.
    """
    others = dict(source.named_modules())
    for name, module in block.named_modules():
        if name not in others or any(tensor.startswith(f"{name}." if name else "") for tensor in missing):
            continue
        for key, value in vars(module).items():
            there = vars(others[name]).get(key)
            scalar = value is None or isinstance(value, (bool, int, float, str))
            numbered = is_whole(value) and is_whole(there) and value - there == moved
            if scalar and value != there and not numbered and not _OF_TRAINING.fullmatch(key):
                return f"{name}.{key} would be {value!r} instead of {there!r}".lstrip(".")
    return None


def _assign(student: PreTrainedModel, saved: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> None:
    """Give the student copies of all values that are saved, and of computed ones where it has them."""
    tensors = _tensors(student)
    wrong = tensors.keys() ^ saved.keys()
    wrong |= {name for name in tensors.keys() - wrong if tensors[name].shape != saved[name].shape}
    ties = {(id(tensor), id(saved[name])) for name, tensor in tensors.items() if name in saved}
    if len(ties) > min(len({ours for ours, _ in ties}), len({theirs for _, theirs in ties})):
        wrong.add("tied weights")
    if wrong:
        raise ValueError(
            f"Blocks of the {type(student).__name__} are of another kind at their new numbers: a student has no place "
            f"for some of their weights, or needs others ({', '.join(sorted(wrong)[:3])}"
            f"{' ...' if len(wrong) > 3 else ''}); choose layers that keep each kind of block in its place, such as "
            "'lowest' or a list that starts with 1."
        )
    for name, buffer in _computed(student).items():
        if name in computed and computed[name].shape == buffer.shape:
            tensors[name] = buffer
    for name, tensor in tensors.items():
        tensor.data = (saved[name] if name in saved else computed[name]).detach().clone()


def _shared_matrix(bank: ProjectionBank, shape: tuple[int, int]) -> Tensor:
    if bank.lacks_matrices:
        raise ValueError(
            "The projection bank is a PCA that was not measured yet: it has no matrix; call its fit first."
        )
    matrices = [tensor for name, tensor in bank.tensors().items() if name.endswith(".weight")]
    if wrong := {tuple(matrix.shape) for matrix in matrices} - {shape}:
        raise ValueError(
            f"The projection bank has matrices of shape {min(wrong)}, but student and teacher need {list(shape)}; "
            "create it for these models."
        )
    if not matrices or any(not torch.equal(matrix, matrices[0]) for matrix in matrices):
        raise ValueError(
            f"The projection bank has a matrix of its own for each of {len(matrices)} layers, so that there is no one "
            "basis for the embeddings; create it with shared=True."
        )
    return matrices[0]
