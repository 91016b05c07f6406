"""What the library takes for granted of transformers, accelerate and torch, with signatures: a release that changes one
of these fails here, by name.

The tables are complete: tests compute from the library's classes and modules what belongs in them.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from conftest import masked_lm_examples, tiny_bert
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers import Wav2Vec2PreTrainedModel as Wav2Vec2

import hf_curriculum_distill as library
from hf_curriculum_distill import CurriculumDistillationTrainer

# Methods of Trainer that the library overrides, and the parameters that they have in every supported release.
OVERRIDDEN = {
    "_determine_best_metric": "metrics, trial",
    "_evaluate": "trial, ignore_keys_for_eval, skip_scheduler",
    "_finish_current_push": "",
    "_get_collator_with_removed_columns": "data_collator, description",
    "_get_dataloader": "dataset, description, batch_size, sampler_fn, is_training, dataloader_key",
    "_init_training_state": "max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_push_from_checkpoint": "checkpoint_folder",
    "_save_checkpoint": "model, trial",
    "_save_rng_state": "output_dir",
    "_set_signature_columns_if_needed": "",
    "__init__": "model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, "
    "compute_loss_func, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, "
    "preprocess_logits_for_metrics",
    "compute_loss": "model, inputs, return_outputs, num_items_in_batch",
    "create_model_card": "language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, "
    "dataset_args",
    "create_scheduler": "num_training_steps, optimizer",
    "evaluation_loop": "dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator, num_batches, device",
    "init_hf_repo": "token",
    "log": "logs, start_time",
    "prediction_step": "model, inputs, prediction_loss_only, ignore_keys",
    "save_model": "output_dir, _internal_call",
    "set_initial_training_values": "args, dataloader",
    "train": "resume_from_checkpoint, trial, ignore_keys_for_eval",
}

# The parameters in newer releases, where there are more, which are passed on unread.
NEWER = {"init_hf_repo": "token, private"}

# Methods of Trainer that it calls, and does not override.
CALLED = {
    "__repr__": "",
    "_get_output_dir": "trial",
    "_prepare_inputs": "inputs",
    "_remove_unused_columns": "dataset, description",
    "add_callback": "callback",
    "compute_loss_context_manager": "",
    "get_decay_parameter_names": "model",
    "is_world_process_zero": "",
    "remove_callback": "callback",
}

# Attributes of Trainer that it reads or sets, and their types after a training.
ATTRIBUTES = {
    "_created_lr_scheduler": bool,
    "_globalstep_last_logged": int,
    "_signature_columns": list,
    "_total_loss_scalar": float,
    "_tr_loss": torch.Tensor,
    "_train_batch_size": int,
    "accelerator": Accelerator,
    "args": TrainingArguments,
    "callback_handler": transformers.trainer_callback.CallbackHandler,
    "compute_loss_func": type(None),
    "data_collator": object,
    "eval_dataset": list,
    "hub_model_id": type(None),
    "is_deepspeed_enabled": bool,
    "is_fsdp_enabled": bool,
    "is_in_train": bool,
    "label_names": list,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "model": PreTrainedModel,
    "model_accepts_loss_kwargs": bool,
    "optimizer": torch.optim.Optimizer,
    "processing_class": type(None),
    "state": transformers.TrainerState,
    "train_dataset": list,
}

# Private attributes of other packages' objects, and where they are.
PRIVATE = {
    "_attn_implementation": PreTrainedConfig(),
    "_cdata": torch.empty(1).untyped_storage(),
    "_dataloaders": Accelerator(cpu=True),
    "_dynamo": torch,
    "_get_feat_extract_output_lengths": Wav2Vec2,
    "_get_feature_vector_attention_mask": Wav2Vec2,
    "_keys_to_ignore_on_save": PreTrainedModel,
    "_replace": transformers.trainer_utils.TrainOutput,
    "_scaled_dot_product_flash_attention_for_cpu": torch.ops.aten,
    "_scaled_dot_product_flash_attention_for_cpu_backward": torch.ops.aten,
}

# Public by name, but in no documentation; or what a callback of the library relies on.
UNDOCUMENTED = {
    "_actions": argparse.ArgumentParser(),
    "_get_formatter": argparse.ArgumentParser(),
    "end_of_dataloader": GradientState(),
    "optimizer_step_was_skipped": Accelerator(cpu=True),
    "mod_tracker": FlopCounterMode(display=False),
    "training_bar": ProgressCallback(),
    "should_epoch_stop": TrainerControl(),
    "should_evaluate": TrainerControl(),
    "should_log": TrainerControl(),
    "should_save": TrainerControl(),
    "should_training_stop": TrainerControl(),
}

# What is imported from modules of transformers and accelerate, or from private ones of torch. The parameters of
# functions; None for constants, modules and classes.
IMPORTED = {
    "accelerate.utils.broadcast": "tensor, from_process",
    "accelerate.utils.convert_outputs_to_fp32": "model_forward",
    "torch._subclasses.fake_tensor.FakeTensorMode": None,
    "torch.utils._python_dispatch.TorchDispatchMode": None,
    "torch.utils._pytree.tree_leaves": "tree, is_leaf",
    "transformers.conversion_mapping.get_model_conversion_mapping": "model, key_mapping, hf_quantizer, add_legacy",
    "transformers.core_model_loading.convert_and_load_state_dict_in_model": "model, state_dict, load_config, "
    "disk_offload_index",
    "transformers.initialization.no_init_weights": "",
    "transformers.loss.loss_utils.ForCausalLMLoss": "logits, labels, vocab_size, num_items_in_batch, ignore_index, "
    "shift_labels, kwargs",
    "transformers.loss.loss_utils.LOSS_MAPPING": None,
    "transformers.modelcard.TASK_MAPPING": None,
    "transformers.modeling_layers.GradientCheckpointingLayer": None,
    "transformers.modeling_outputs.SequenceClassifierOutput": None,
    "transformers.modeling_utils.LoadStateDictConfig": None,
    "transformers.modeling_utils.load_state_dict": "checkpoint_file, map_location, weights_only, disable_mmap",
    "transformers.models.auto.modeling_auto": None,
    "transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES": None,
    "transformers.trainer.TRAINER_STATE_NAME": None,
    "transformers.trainer_pt_utils.BatchRebalanceSampler": None,
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": None,
    "transformers.trainer_utils.has_length": "dataset",
    "transformers.trainer_utils.sort_checkpoints": "output_dir, checkpoint_prefix, use_mtime, best_model_checkpoint",
    "transformers.utils.CONFIG_NAME": None,
    "transformers.utils.ModelOutput": None,
    "transformers.utils.SAFE_WEIGHTS_INDEX_NAME": None,
    "transformers.utils.SAFE_WEIGHTS_NAME": None,
    "transformers.utils.WEIGHTS_INDEX_NAME": None,
    "transformers.utils.WEIGHTS_NAME": None,
    "transformers.utils.cached_file": "path_or_repo_id, filename, kwargs",
    "transformers.utils.extract_commit_hash": "resolved_file, commit_hash",
    "transformers.utils.logging": None,
}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def stock_trainer(folder, callbacks=(), **fields):
    silence = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    args = TrainingArguments(str(folder), **silence | {"max_steps": 1, "save_strategy": "no"} | fields)
    data = masked_lm_examples(12)
    return Trainer(tiny_bert(1), args, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = stock_trainer(tmp_path_factory.mktemp("stock"))
    trainer.train()
    return trainer


# ---- names and signatures ----


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_methods_of_trainer_have_the_parameters_that_they_are_used_with(name):
    known = {(OVERRIDDEN | CALLED)[name], NEWER.get(name)}
    assert ", ".join(parameters(getattr(Trainer, name))) in known


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_trainer_are_of_the_types_that_they_are_used_as(trained, name):
    assert isinstance(getattr(trained, name), ATTRIBUTES[name])


@pytest.mark.parametrize("name", PRIVATE | UNDOCUMENTED)
def test_attributes_of_others_are_where_they_are_looked_for(name):
    assert hasattr((PRIVATE | UNDOCUMENTED)[name], name)


@pytest.mark.parametrize("name", IMPORTED)
def test_functions_of_others_have_the_parameters_that_they_are_used_with(name):
    found = pkgutil.resolve_name(name)
    if IMPORTED[name] is None:
        assert not inspect.isfunction(found)
    else:
        assert ", ".join(parameters(found)) == IMPORTED[name]


def test_callbacks_get_the_dataloader_that_an_epoch_is_read_from(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, *, train_dataloader, **kwargs):
            seen.append(train_dataloader)

    trainer = stock_trainer(tmp_path, [Watch()])
    iterated = trainer._run_epoch
    trainer._run_epoch = lambda **kwargs: (seen.append(kwargs["train_dataloader"]), iterated(**kwargs))
    trainer.train()
    assert seen[0] is seen[1]


# ---- the tables are complete ----

CLASSES = [owner for owner in CurriculumDistillationTrainer.__mro__ if issubclass(owner, Trainer) and owner != Trainer]
MODULES = [module.name for module in pkgutil.walk_packages(library.__path__, f"{library.__name__}.")]


def trees():
    for name in MODULES:
        with open(importlib.util.find_spec(name).origin, encoding="utf-8") as file:
            yield ast.parse(file.read())


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_every_override_of_a_method_of_trainer_is_listed():
    methods = {name for name, value in vars(Trainer).items() if callable(value) or isinstance(value, property)}
    assert methods & {name for owner in CLASSES for name in vars(owner)} == OVERRIDDEN.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overrides_take_what_trainer_passes(name):
    for owner in (owner for owner in CLASSES if name in vars(owner)):
        signature = inspect.signature(vars(owner)[name])
        signature.bind_partial(None, *OVERRIDDEN[name].split(", ") if OVERRIDDEN[name] else ())
        if name != "_init_training_state":  # which Trainer calls with positions only
            signature.bind_partial(None, **dict.fromkeys(filter(None, OVERRIDDEN[name].split(", "))))


def test_every_attribute_of_trainer_that_the_library_touches_is_listed(trained):
    theirs, used = {*dir(Trainer), *vars(trained)}, set()
    for owner in CLASSES:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner)))):
            if isinstance(node, ast.Attribute):
                base = node.value.func if isinstance(node.value, ast.Call) else node.value
                if isinstance(base, ast.Name) and base.id in ("self", "super"):
                    used.add(node.attr)
    assert used & theirs - OVERRIDDEN.keys() == {*CALLED, *ATTRIBUTES}


def test_every_private_attribute_of_others_is_listed():
    used, own = set(), set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if of_self else used).add(node.attr)
    assert used - own == PRIVATE.keys()


def test_every_import_from_inside_another_package_is_listed():
    used = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module.startswith(("transformers.", "accelerate.")):
                    used |= names
                elif not node.module.startswith(("__future__", library.__name__)):
                    used |= {name for name in names if any(map(is_private, name.split(".")))}
    assert used == IMPORTED.keys()
