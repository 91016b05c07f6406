"""Antibody heavy chains, drawn from a model of how human B cells recombine their genes, as a text for bert_large.py.

    pip install olga==1.3.0
    python recipes/antibodies.py --output_dir runs/antibodies/data

The model (Marcou et al. 2018; Sethna et al. 2019, doi 10.1093/bioinformatics/btz035; package olga) draws genes and the
junction between them; before and after it a chain is its V and its J gene as inherited, without mutations.
Written as train.jsonl and validation.jsonl, one chain a row, its amino acids separated by spaces.
"""

import importlib.util
import json
import os
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from hf_curriculum_distill.parsing import parse_arguments

CODONS = ["".join(codon) for codon in product("TCAG", repeat=3)]
AMINO_ACIDS = dict(
    zip(CODONS, "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG", strict=True)
)  # the standard genetic code


@dataclass
class AntibodyArguments:
    output_dir: str = field(metadata={"help": "Folder of the two files."})
    num_train: int = field(default=60_000, metadata={"help": "Chains to train on."})
    num_validation: int = field(default=4000, metadata={"help": "Chains held out; none is among those to train on."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})


def main():
    [args] = parse_arguments([AntibodyArguments], description=__doc__.split("\n")[0])
    if importlib.util.find_spec("olga") is None:
        raise SystemExit("This recipe needs the package olga: pip install olga")
    draw, known, chains = chain_drawer(args.seed), set(), []
    while len(chains) < args.num_train + args.num_validation:
        chain = draw()
        if chain not in known:
            known.add(chain)
            chains.append(chain)
    os.makedirs(args.output_dir, exist_ok=True)
    for split, part in (("train", chains[: args.num_train]), ("validation", chains[args.num_train :])):
        with open(os.path.join(args.output_dir, f"{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": " ".join(chain)}) + "\n" for chain in part)
    lengths = [len(chain) for chain in chains]
    print(f"{args.output_dir}: {len(chains):,} chains of {min(lengths)} to {max(lengths)} amino acids")


def chain_drawer(seed: int):
    """A function that draws a chain, as a string of one-letter amino acids."""
    import olga
    from olga.load_model import GenerativeModelVDJ, GenomicDataVDJ
    from olga.sequence_generation import SequenceGenerationVDJ

    model = Path(olga.__file__).parent / "default_models/human_B_heavy"
    genes, rules = GenomicDataVDJ(), GenerativeModelVDJ()
    anchors = {gene: str(model / f"{gene}_gene_CDR3_anchors.csv") for gene in "VJ"}
    genes.load_igor_genomic_data(str(model / "model_params.txt"), anchors["V"], anchors["J"])
    rules.load_and_process_igor_model(str(model / "model_marginals.txt"))
    np.random.seed(seed)  # olga draws from NumPy's global state
    generator = SequenceGenerationVDJ(rules, genes)
    starts = {gene: read_anchors(path) for gene, path in anchors.items()}

    def draw() -> str:
        while True:
            junction, _, v, j = generator.gen_rnd_prod_CDR3()  # from the conserved C of V to the conserved W of J
            (v_name, _, v_gene), (j_name, _, j_gene) = genes.genV[v], genes.genJ[j]
            sequence = v_gene[: starts["V"][v_name]] + junction + j_gene[starts["J"][j_name] + 3 :]
            chain = "".join(AMINO_ACIDS[sequence[i : i + 3]] for i in range(0, len(sequence) - 2, 3))
            if "*" not in chain:
                return chain

    return draw


def read_anchors(path: str) -> dict[str, int]:
    """Where the junction begins (V) or its last codon does (J), in nucleotides, by the gene's name."""
    rows = [line.split(",") for line in Path(path).read_text().splitlines()[1:]]
    return {name: int(position) for name, position, *_ in rows}


if __name__ == "__main__":
    main()
