"""Load models with plain transformers and let them fill in blanks: python recipes/fill_mask.py FOLDER ..."""

import sys

from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

SENTENCES = (
    "The capital of France is [MASK].",
    "He was born in London, [MASK] 12 May 1901.",
    "The album was released [MASK] the United States.",
)


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for folder in sys.argv[1:]:
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)
        print(f"\n{folder}")
        for sentence in SENTENCES:
            tokens = ", ".join(f"{guess['token_str']} ({guess['score']:.2f})" for guess in fill(sentence))
            print(f"  {sentence}  ->  {tokens}")


if __name__ == "__main__":
    main()
