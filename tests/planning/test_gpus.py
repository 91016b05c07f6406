import pytest

from hf_curriculum_distill.planning import GPUS

# as the data sheets print them: tera-operations a second in bfloat16 with sparsity and in float32, gigabytes
DATA_SHEETS = {"h100": (1979, 67, 80), "a100": (624, 19.5, 80), "l4": (242, 30.3, 24), "rtx4090": (330.4, 82.6, 24)}


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_those_of_the_data_sheets_without_sparsity(name):
    sparse, float32, memory = DATA_SHEETS[name]
    gpu = GPUS[name]
    assert gpu.peak["bfloat16"] == pytest.approx(sparse / 2 * 1e12, rel=2e-4)
    assert gpu.peak["float32"] == float32 * 1e12 and gpu.memory == memory * 2**30
    assert gpu.name.endswith(f"{memory} GB")
