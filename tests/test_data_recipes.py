"""Recipes that make data and vocabularies for the others."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, set_seed

ROOT = Path(__file__).parents[1]
TEXT = ["the cat sat on the mat and the cat ate", "a dog and a cat sat", "unbelievable!"]


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def test_a_pruned_model_computes_the_same_and_can_still_write_every_word(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/data/bert_uncased")
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    Dataset.from_dict({"text": TEXT}).to_parquet(tmp_path / "text/train.parquet")
    options = ["--model", tmp_path / "whole", "--output_dir", tmp_path / "pruned", "--dataset", tmp_path / "text"]
    done = run("recipes/prune_vocabulary.py", *options, "--vocab_size", "3000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3,000 of 30,522 entries, which were 100.0% of the text" in done.stdout

    pruned, small = (
        AutoModel.from_pretrained(tmp_path / "pruned").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "pruned"),
    )
    assert len(small) == pruned.config.vocab_size == 3000
    assert small.tokenize(TEXT[0]) == tokenizer.tokenize(TEXT[0])
    with torch.no_grad():
        whole, cut = (m(**t(TEXT[0], return_tensors="pt"))[0] for m, t in ((model, tokenizer), (pruned, small)))
    torch.testing.assert_close(cut, whole)
    assert small.unk_token not in small.tokenize("quixotic zymurgy 1984")

    done = run("recipes/prune_vocabulary.py", *options, "--vocab_size", "100")
    assert done.returncode == 1 and "but special tokens and single characters alone are" in done.stderr


def test_antibodies_are_chains_of_amino_acids_or_the_missing_package_is_named(tmp_path):
    options = ["--output_dir", tmp_path, "--num_train", "20", "--num_validation", "5"]
    done = run("recipes/antibodies.py", *options)
    if importlib.util.find_spec("olga") is None:  # its dependencies are large, so the tests do without
        assert (done.returncode, done.stderr) == (1, "This recipe needs the package olga: pip install olga\n")
        return
    assert done.returncode == 0, done.stderr[-2000:]
    chains = [
        [json.loads(line)["text"].split() for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    ]
    assert [len(part) for part in chains] == [20, 5]
    everything = ["".join(chain) for part in chains for chain in part]
    assert len(set(everything)) == 25 and set("".join(everything)) <= set("ACDEFGHIKLMNPQRSTVWY")


def test_codons_are_those_of_the_standard_genetic_code():
    spec = importlib.util.spec_from_file_location("antibodies", ROOT / "recipes/antibodies.py")
    antibodies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(antibodies)
    code = antibodies.AMINO_ACIDS
    assert (len(code), len(set(code.values()) - {"*"})) == (64, 20)
    assert {codon for codon, acid in code.items() if acid == "*"} == {"TAA", "TAG", "TGA"}
    assert (code["ATG"], code["TGG"], code["TGT"], code["AGA"], code["GGC"]) == ("M", "W", "C", "R", "G")
