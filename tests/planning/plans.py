"""Models, data and plans that the tests of plans share."""

from itertools import accumulate

import torch
from conftest import VOCAB_SIZE
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    TrainerCallback,
)

from hf_curriculum_distill import CURRICULUM_EXTRACTION
from hf_curriculum_distill.planning import PlanArguments, PlannedConfig, make_plan

LENGTH, LABELS = 12, 3  # tokens of an example, and how many of them a masked LM predicts
CHOICES = 3


def tiny_gpt(depth):
    torch.manual_seed(depth)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=depth, n_head=2, n_positions=32))


def examples_for(model):
    """Examples with equally many labels, so that all batches cost the same."""
    torch.manual_seed(0)
    examples = []
    for _ in range(16):
        ids = torch.randint(5, model.config.vocab_size, (LENGTH,))
        if isinstance(model, BertForQuestionAnswering):
            examples.append({"input_ids": ids, "start_positions": ids[0] % 3, "end_positions": ids[1] % 3 + 3})
            continue
        if isinstance(model, BertForMultipleChoice):
            ids = torch.stack([ids.roll(turn) for turn in range(CHOICES)])
            examples.append({"input_ids": ids, "labels": ids[0, 0] % CHOICES})
            continue
        if type(model) is BertModel:
            examples.append({"input_ids": ids})
            continue
        if isinstance(model, BertForSequenceClassification):
            kind, number = model.config.problem_type, model.config.num_labels
            several = {"regression": torch.rand(number), "multi_label_classification": torch.arange(number) % 2.0}
            labels = several.get(kind, ids[0] % 2)
        elif isinstance(model, (GPT2LMHeadModel, LlamaForCausalLM)):
            labels = ids
        elif isinstance(model, BertForTokenClassification):
            labels = ids % 2
        else:
            labels = torch.where(torch.randperm(LENGTH) < LABELS, ids, -100)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def saved(folder, model):
    model.config.save_pretrained(folder)
    return str(folder / "config.json")


def folder_of(tmp_path, name, model):
    return saved(tmp_path / name, model).removesuffix("/config.json")


def planned(tmp_path, student, teacher, options=None, **fields):
    tasks = {"BertForMaskedLM": "MaskedLM", "GPT2LMHeadModel": "CausalLM", "LlamaForCausalLM": "CausalLM"}
    tasks |= {f"BertFor{name}": name for name in ("QuestionAnswering", "MultipleChoice", "TokenClassification")}
    tasks["BertModel"] = "Embeddings"
    task = tasks.get(type(student).__name__, "SequenceClassification")
    share = {"mlm_probability": LABELS / LENGTH} if task == "MaskedLM" else {}
    models = {"student": saved(tmp_path / "student", student), "teacher": saved(tmp_path / "teacher", teacher)}
    shape = {"task": task, "block_size": LENGTH, "num_choices": CHOICES} | share
    defaults = CURRICULUM_EXTRACTION | {"max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True}
    return make_plan(
        PlanArguments(**models | shape | (options or {})), PlannedConfig(str(tmp_path / "out"), **defaults | fields)
    )


class Watch(TrainerCallback):
    """What a real run's last step of each stage had: parameters with gradients, bytes of optimizer states."""

    def __init__(self):
        self.trained, self.states = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trained[self.trainer.stage.name] = sum(p.numel() for p in model.parameters() if p.grad is not None)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        states = (v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v) and v.dim())
        self.states[self.trainer.stage.name] = sum(v.numel() * v.element_size() for v in states)


def peak_bytes(record):
    """The most bytes that torch held at once while a profiler recorded, beyond those at its start."""
    events = record.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
