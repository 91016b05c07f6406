"""The recipe for causal language models as a subprocess, in seconds."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_fork, start_fork, tiny_bert, wait_for_fork
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_curriculum_distill import ProjectionBank
from hf_curriculum_distill.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
WORDS = ["the", "a", "cat", "dog", "bat", "rat", "sat", "ran", "ate", "on", "in", "at", "mat", "hat", "day", "box"]
BLOCK = 16
TINY = f"--student 2-16 --block_size {BLOCK} --eval_blocks 8 --train_documents 10 --text_column body --max_steps 4 "
TINY += "--save_steps 2 --eval_strategy no --logging_steps 1 --per_device_train_batch_size 4 --calibration_samples 8 "
TINY += "--use_cpu true --disable_tqdm true --resume_from_checkpoint True "
TINY += "--methods curriculum one_shot labels smaller --seeds 0 1"
VARIANTS = {
    "smaller": {"method": "one_shot", "student": "1-8", "student_embeddings": "projected", "learning_rate": 0.0}
}


def documents(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) for _ in range(count)]


def byte_tokenizer(**tokens):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents(50, seed=2), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("causal_lm")
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": True}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder / "teacher")
    (folder / "text").mkdir()
    for seed, (name, count) in enumerate({"train": 30, "validation": 20}.items()):
        lines = [json.dumps({"body": document}) for document in documents(count, seed)]
        (folder / f"text/{name}.jsonl").write_text("\n".join(lines))
    return folder


def options(folder, output="students"):
    paths = {"--teacher": "teacher", "--dataset": "text", "--output_dir": output}
    paths = [part for option, name in paths.items() for part in (option, str(folder / name))]
    return [*TINY.split(), *paths, "--variants", json.dumps(VARIANTS)]


@pytest.fixture(scope="module")
def causal_lm():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("causal_lm", ROOT / "recipes/causal_lm.py")
    module = sys.modules["causal_lm"] = importlib.util.module_from_spec(spec)  # its arguments are pickled by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipes/causal_lm.py", *options(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "students/results.json").read_text()), done


def test_every_student_is_a_small_model_of_the_teachers_family(folder, finished):
    results, done = finished
    runs = [(method, seed) for method in ("curriculum", "one_shot", "labels", "smaller") for seed in (0, 1)]
    assert [(result["method"], result["seed"]) for result in results] == runs
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert table[0].split()[:3] == ["method", "bits/byte", "accuracy"]
    assert [line.split()[0] for line in table[2:11]] == ["(teacher)", *(method for method, _ in runs)]
    assert table[3].split()[1] == f"{results[0]['eval_bits_per_byte']:.4f}"
    for result in results:
        assert result["finite"] and result["steps"] == 4 and result["samples"] == 16
        config = AutoModelForCausalLM.from_pretrained(result["path"]).config
        size = (1, 8) if result["method"] == "smaller" else (2, 16)
        assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", *size)
        assert config.intermediate_size == 2 * config.hidden_size
        assert config.num_attention_heads == config.hidden_size // 8  # as wide as the teacher's
    assert Path(folder, "students/comparison.png").is_file()
    matrix = ProjectionBank.create([(1, 1)], [8], [32], shared=True).tensors()["layer_1_1.weight"]
    name, places = "model.embed_tokens.weight", (folder / "teacher", Path(results[-1]["path"]))
    theirs, ours = (load_file(place / "model.safetensors")[name] for place in places)
    torch.testing.assert_close(ours, theirs @ matrix.T)  # its learning rate is 0


def test_the_teacher_runs_once_for_all_methods_and_seeds_and_the_log_says_so(folder, finished):
    results, done = finished
    ran = [(result["method"], result["seed"]) for result in results if result["teacher_flops"] > 0]
    assert ran == [("curriculum", 0)]
    found = re.findall(r"teacher_cache: (\S+) % of epoch (\d) were found", done.stderr)
    assert found == [("0.0", "1"), ("100.0", "2"), *5 * [("100.0", "1"), ("100.0", "2")]]  # none for the labels
    assert any((folder / "students/_teacher_cache").iterdir())  # a name that Trainer does not push
    assert not (folder / "students/teacher_cache").exists()


def test_bits_a_byte_are_those_of_a_hand_computation(folder, finished):
    results, done = finished
    tokenizer, stream = byte_tokenizer(eos_token="<|endoftext|>"), []
    for document in documents(20, seed=1):
        stream += [*tokenizer(document)["input_ids"], 0]
    blocks = [stream[start : start + BLOCK] for start in range(0, 8 * BLOCK, BLOCK)]
    num_bytes = sum(len(tokenizer.decode(block[1:]).replace("<|endoftext|>", "").encode()) for block in blocks)
    assert num_bytes > 8 * (BLOCK - 1)
    for name, bits in [("teacher", None), *((result["path"], result["eval_bits_per_byte"]) for result in results)]:
        model, nats = AutoModelForCausalLM.from_pretrained(folder / name), 0.0
        for block in blocks:
            with torch.no_grad():
                predicted = model(torch.tensor([block])).logits[0].log_softmax(-1)
            nats -= sum(predicted[i, block[i + 1]].item() for i in range(BLOCK - 1))
        if bits is None:
            assert f"Teacher: {nats / math.log(2) / num_bytes:.4f} bits a byte" in done.stderr
        else:
            assert bits == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_launch_that_was_killed_and_goes_on_ends_as_if_it_had_not_been(folder, finished, causal_lm, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *options(folder, "again")])
    begun, deadline = start_fork(causal_lm.main), time.monotonic() + 120
    while not list(folder.glob("again/one_shot/seed-0/checkpoint-2/trainer_state.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(begun, signal.SIGKILL)
    assert wait_for_fork(begun) == -signal.SIGKILL
    assert in_fork(causal_lm.main) == 0
    again = json.loads((folder / "again/results.json").read_text())
    for expected, actual in zip(finished[0], again, strict=True):
        # the teacher may have run for what was written to the cache just before the end
        assert {n for n in expected if expected[n] != actual[n]} <= {"path", "seconds", "teacher_flops"}
        weights = [load_file(Path(result["path"], "model.safetensors")) for result in (expected, actual)]
        assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--student", "huge"], "'huge' is no model: use"),
        (["--teacher", "masked"], "is a BertForMaskedLM, without a head that predicts the next token"),
        (["--tokenizer", "endless"], "has no end-of-sequence token"),
        (["--teacher", "nothing"], "The model 'nothing' is not within reach"),
        (["--student", "teacher-9"], "num_layers is 9, but the teacher has 4 blocks"),
        (["--student", "teacher-2", "--student_embeddings", "projected"], "'teacher-2' has embeddings to start from"),
        (["--student", "2-15"], "There is no LlamaConfig with num_layers=2 and hidden_size=15"),
        (["--gguf_file", "teacher.gguf"], "the package that reads it is missing; pip install gguf"),
        (["--teacher_from", "teacher"], "teacher_from is set, but"),
        (["--evaluate_on", "train"], "evaluate_on is 'train'; use 'test' or 'validation'"),
        (["--methods", "two_shot"], "methods names 'two_shot'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_can_not_work_is_said_in_one_line_before_data_is_read(
    folder, causal_lm, monkeypatch, capsys, tmp_path, others, message
):
    tiny_bert(1).save_pretrained(tmp_path / "masked")
    byte_tokenizer().save_pretrained(tmp_path / "endless")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(causal_lm, "is_gguf_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *options(folder), "--dataset", "no_such_data", *others])
    with pytest.raises(SystemExit) as exit:
        causal_lm.main()
    said = str(exit.value.code) + capsys.readouterr().err
    assert message in said and "no_such_data" not in said
    assert len(str(exit.value.code).splitlines()) == 1


def test_students_are_made_by_size_of_the_teachers_layers_or_read(folder, causal_lm, finished, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16)

    def make(student, **options):
        return causal_lm.make_student(causal_lm.RecipeArguments(student=str(student), **options), teacher)

    sizes = {"1-8": (1, 8), "teacher-2": (2, 32), "teacher-3-16": (3, 16)}
    for name, size in sizes.items():
        student = make(name)
        assert (student.config.num_hidden_layers, student.config.hidden_size) == size
        assert student.dtype == torch.float32
    last = "layers.{}.mlp.up_proj.weight"
    theirs = teacher.model.get_parameter(last.format(3)).float()
    assert torch.equal(make("teacher-2").model.get_parameter(last.format(1)), theirs)
    assert make("1-8", dropout=0.25).config.attention_dropout == 0.25
    saved = Path(finished[0][0]["path"])
    name = "model.embed_tokens.weight"
    weights = load_file(saved / "model.safetensors")
    assert torch.equal(make(saved).state_dict()[name], weights[name])
    fresh = make(saved / "config.json").state_dict()[name]
    assert fresh.shape == weights[name].shape and not torch.equal(fresh, weights[name])


def test_settings_are_chosen_on_other_blocks_than_are_reported(folder, causal_lm):
    recipe = causal_lm.RecipeArguments(
        teacher=str(folder / "teacher"), dataset=str(folder / "text"), text_column="body", block_size=8, eval_blocks=5
    )
    _, args = parse_arguments([causal_lm.RecipeArguments, causal_lm.TrainingConfig], ["--use_cpu", "true"])
    sets = {}
    for name in ("test", "validation"):
        recipe.evaluate_on = name
        train, sets[name] = causal_lm.load_data(recipe, args, causal_lm.find_tokenizer(recipe, args))
    assert [len(blocks) for blocks in sets.values()] == [5, 5]
    assert not {*map(tuple, sets["test"]["input_ids"])} & {*map(tuple, sets["validation"]["input_ids"])}
    # without a set of its own, part of the text is held out
    recipe.dataset, recipe.heldout_documents = str(folder / "text/train.jsonl"), 8
    fewer, heldout = causal_lm.load_data(recipe, args, causal_lm.find_tokenizer(recipe, args))
    assert len(fewer) < len(train) and len(heldout) == 5
    recipe.eval_blocks = 1000
    with pytest.raises(ValueError, match="fills no block of 8 tokens for the validation set; raise --heldout"):
        causal_lm.load_data(recipe, args, causal_lm.find_tokenizer(recipe, args))


def test_a_teacher_is_read_from_where_its_arguments_say(folder, causal_lm, monkeypatch, tmp_path):
    shutil.copytree(folder / "teacher", tmp_path / "teacher/best")
    for path in (tmp_path / "teacher/best").glob("*token*"):
        path.rename(tmp_path / "teacher" / path.name)
    where = ["--teacher_model_init_kwargs", '{"subfolder": "best"}', "--teacher", str(tmp_path / "teacher")]
    one = ["--output_dir", str(tmp_path / "student"), "--methods", "curriculum", "--seeds", "0", "--learning_rate", "0"]
    command = [*options(folder), *where, *one, "--student", "teacher-2", "--projection", "identity"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *command])
    causal_lm.main()
    name = "model.embed_tokens.weight"
    places = tmp_path / "student", folder / "teacher"
    student, teacher = (load_file(place / "model.safetensors")[name] for place in places)
    assert torch.equal(student, teacher)


def test_the_defaults_are_the_real_job(causal_lm):
    recipe, args = parse_arguments([causal_lm.RecipeArguments, causal_lm.TrainingConfig], [])
    assert (recipe.teacher, recipe.dataset) == ("HuggingFaceTB/SmolLM2-135M", "wikimedia/wikipedia")
    assert (recipe.student, recipe.block_size, args.method) == ("4-192", 128, "curriculum")


def test_a_teacher_is_read_from_a_gguf_file(folder, causal_lm, tmp_path):
    gguf = pytest.importorskip("gguf")
    teacher, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "teacher"),
        byte_tokenizer(eos_token="<|endoftext|>"),
    )
    write_gguf(gguf, tmp_path / "teacher.gguf", teacher, tokenizer)
    recipe = causal_lm.RecipeArguments(teacher=str(tmp_path), gguf_file="teacher.gguf")
    args = causal_lm.TrainingConfig(use_cpu=True)
    causal_lm.check_run(causal_lm.Run("curriculum", recipe, args))
    text = "the cat sat on É日本"
    ids = tokenizer(text)["input_ids"]
    assert causal_lm.find_tokenizer(recipe, args)(text)["input_ids"] == ids
    read = causal_lm.find_teacher(recipe, args)
    with torch.no_grad():
        expected, actual = (model(torch.tensor([ids])).logits for model in (teacher, read))
    torch.testing.assert_close(actual, expected)
    assert not getattr(read, "is_quantized", False)


def write_gguf(gguf, path, model, tokenizer):
    """Write a Llama as llama.cpp does, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokenizer) - 1))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbours, not halves
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
