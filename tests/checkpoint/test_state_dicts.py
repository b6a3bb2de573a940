"""Weights of torch.save are read without running anything, and converted to what tenfold reads everywhere."""

from __future__ import annotations

import argparse
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tenfold.checkpoint.state_dicts import read_state_dict, write_state_dict
from tenfold.errors import CheckpointError

W = torch.arange(6.0).reshape(2, 3)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


def stored(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path / "net.pth", **options)
    return path / "net.pth"


@pytest.mark.parametrize(
    ("value", "key", "dropped"),
    [
        ({"a": W}, "", ()),
        (OrderedDict(a=nn.Parameter(W)), "", ()),
        ({"module.a": W}, "", ()),
        ({"module._orig_mod.a": W}, "", ()),
        ({"epoch": 3, "state_dict": {"module.a": W}, "optimizer": {"state": {}}}, "state_dict", ("epoch", "optimizer")),
        ({"model": {"a": W}, "args": argparse.Namespace(lr=0.1)}, "model", ("args",)),
        ({"a": W, "best": np.float64(0.9), "version": 2, "note": "x"}, "", ("best", "version", "note")),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_the_state_dict_is_found(value: Any, key: str, dropped: Any, archive: bool, tmp_path: Path) -> None:
    found = read_state_dict(stored(tmp_path, value, _use_new_zipfile_serialization=archive))
    assert list(found.tensors) == ["a"]
    assert torch.equal(found.tensors["a"], W)
    assert (found.key, found.dropped) == (key, dropped)


def test_a_key_of_ones_own(tmp_path: Path) -> None:
    file = stored(tmp_path, {"state_dict": {"a": W}, "ema": {"model": {"a": -W}}})
    assert torch.equal(read_state_dict(file, key="ema.model").tensors["a"], -W)
    with pytest.raises(CheckpointError, match=r"no state dict under 'ema.net'. It holds: state_dict, ema"):
        read_state_dict(file, key="ema.net")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": W, "x": Evil()}, "holds objects of posix.mkdir, and reading these would run code"),
        (nn.Linear(2, 2), "holds objects of torch.nn.modules.linear.Linear"),
        ([W], "holds no state dict. It holds: list"),
        ({"a": 3}, "holds no state dict. It holds: a"),
        ({}, "It holds: nothing"),
    ],
)
def test_what_is_none_is_refused_and_not_run(
    value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state_dict(stored(tmp_path, value))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_a_program_is_no_state_dict(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="is a program of TorchScript"):
        read_state_dict(tmp_path / "net.pt")


def test_damage_is_refused_in_one_line(tmp_path: Path) -> None:
    raw, chance = stored(tmp_path, {"a": torch.randn(40, 40)}).read_bytes(), random.Random(0)  # noqa: S311 - no secret
    whole = read_state_dict(tmp_path / "net.pth").tensors["a"]
    for number in range(150):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (tmp_path / "net.pth").write_bytes(changed if number % 3 else raw[: chance.randrange(len(raw))])
        try:
            found = read_state_dict(tmp_path / "net.pth").tensors
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some damage hits nothing
        else:  # only what lies between the parts of the archive
            assert torch.equal(found["a"], whole)


def test_shared_memory_views_and_types_survive(tmp_path: Path) -> None:
    tensors = {"a": W, "tied": W, "part": W[:1], "turned": W.t(), "half": W.bfloat16(), "count": torch.tensor(3)}
    write_state_dict(read_state_dict(stored(tmp_path, tensors)).tensors, tmp_path / "net.safetensors")
    found = load_file(tmp_path / "net.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
