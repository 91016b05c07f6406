import runpy
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_curriculum_distill.planning import SIZES, find_config

ROOT = Path(__file__).parents[2]

TOKENIZER = ROOT / "recipes/data/bert_uncased"


def test_sizes_are_the_models_that_the_recipe_makes():
    recipe, tokenizer = runpy.run_path(str(ROOT / "recipes/bert_large.py")), AutoTokenizer.from_pretrained(TOKENIZER)
    for name in [*SIZES, "bert-6-768", "bert-2-64", "bert-1-32"]:
        with torch.device("meta"):
            made = recipe["make_model"](name, 0.0, tokenizer).config.to_diff_dict()
        found = find_config(name, dropout=0.0, vocab_size=len(tokenizer)).to_diff_dict()
        assert found == {key: value for key, value in made.items() if key not in ("architectures", "dtype")}
