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


def test_mails_become_texts_without_headers_tags_or_repetitions(tmp_path):
    html = "<html><style>p {color: red}</style><p>Buy&nbsp;now, <b>cheap</b>!</p></html>"
    spam = f"Subject: Offer\nX-Spam: yes\nContent-Type: text/html; charset=no-such\n\n{html}"
    mails = {
        "spam-1/1": spam,
        "spam-2/1": spam,
        "easy-ham-1/1": "Subject: Lunch\n\nAt\none?",
        "hard-ham-1/1": "A: b\n\n",
    }
    mails |= {f"easy-ham-2/{n}": f"Received: from somewhere\n\nmail {n}" for n in range(3)}
    for name, text in mails.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": text}))
    options = ["recipes/mails.py", "--source", tmp_path, "--output_dir", tmp_path / "data", "--num_heldout"]
    done = run(*options, "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("5 different mails of 7, 1 of them spam\n")
    splits = {split: (tmp_path / f"data/{split}.jsonl").read_text() for split in ("train", "validation", "test")}
    assert [len(text.splitlines()) for text in splits.values()] == [3, 1, 1]
    rows = {(row := json.loads(line))["text"]: row["label"] for line in "".join(splits.values()).splitlines()}
    ham = {"Lunch At one?": "ham"} | {f"mail {n}": "ham" for n in range(3)}
    assert rows == ham | {"Offer Buy now, cheap !": "spam"}

    done = run(*options, "3")
    assert done.returncode == 1 and "has 5 different mails; 3 for each of validation and test leave none" in done.stderr
