"""Whole networks, small: the profile against the flop counter, by the code that makes the committed table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.profile_macs.run import compare

NETWORKS: list[dict[str, Any]] = [
    {"name": "torchvision:resnet18", "size": 32, "batch": 2},
    {"name": "torchvision:mobilenet_v2", "size": 32},
    {"name": "torchvision:vit_b_16", "size": 32},
    {"name": "transformers:bert-base", "size": 8, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40},
    {"name": "torch:transformer-encoder", "size": 7, "width": 16, "heads": 4, "hidden": 24, "layers": 2, "batch": 3},
    {"name": "torch:lstm", "size": 5, "input_size": 6, "hidden_size": 8, "bidirectional": True, "batch": 3},
    {"name": "torch:gru", "size": 5, "input_size": 6, "hidden_size": 8},
]
EXTRAS = {"torchvision": "torchvision", "transformers": "transformers", "torch": "torch"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wanted", NETWORKS, ids=lambda wanted: wanted["name"])
def test_every_mac_of_a_network_is_accounted_for(wanted: dict[str, Any]) -> None:
    pytest.importorskip(EXTRAS[wanted["name"].partition(":")[0]])
    row, _ = compare(wanted)
    assert row["macs"] == row["counter_half"] == row["layers"] + row["other"]
    assert row["equal"]
    assert row["params_equal"]
    assert row["by_hand"] in (None, row["macs"])
    assert row["uncounted"] == {}
    assert row["odd_notes"] == []
    assert row["macs"] > 0
