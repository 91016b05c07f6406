"""`python -m hf_curriculum_distill` is `hf-curriculum-distill`, which `accelerate launch -m` can start, too."""

from hf_curriculum_distill.cli import main

if __name__ == "__main__":
    main()
