"""What a result says of the machine that it was made on."""

import pytest
import torch

from tenfold.profiling import LatencyTable, environment


def test_a_processor_is_named_with_the_instructions_that_torch_uses():
    assert environment().device_name.endswith(f"({torch.backends.cpu.get_cpu_capability()})")


def test_times_of_other_instructions_are_times_of_another_machine(monkeypatch: pytest.MonkeyPatch):
    here = LatencyTable(cache=None).conditions
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert LatencyTable(cache=None).conditions != here


def test_a_device_without_a_name_has_none():
    assert environment(torch.device("meta")).device_name == ""
