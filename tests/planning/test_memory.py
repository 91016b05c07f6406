import torch

from hf_curriculum_distill.planning.memory import PeakMemory


def test_gradients_leave_the_account_when_they_are_whole():
    layers = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(8)))
    peaks = []
    for parameters in ((), layers.parameters()):
        layers.zero_grad()
        with PeakMemory(parameters) as memory:
            layers(torch.ones(1, 100)).sum().backward()
        peaks.append(memory.peak)
        assert memory.peak_with_gradients == peaks[0]
    assert peaks[0] > 8 * 4 * 100**2 > 3 * peaks[1]
