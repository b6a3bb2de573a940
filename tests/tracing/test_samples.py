"""Samples are held out whole, and only from batches whose samples do not know of each other."""

from __future__ import annotations

import torch
from torch import nn

from tenfold.tracing.samples import count_samples, parted


def held(model, batches, share=0.25):
    kept, out = parted(model, batches, share)
    assert count_samples(kept) + count_samples(out) == count_samples(batches)
    return count_samples(out)


def test_whole_batches_are_taken_where_there_are_enough():
    model = nn.Linear(3, 2)
    batches = [torch.full((4, 3), float(i)) for i in range(12)]
    kept, out = parted(model, batches, 0.25)
    assert [float(b[0, 0]) for b in out] == [2.0, 6.0, 10.0]
    assert all(any(b is c for c in batches) for b in (*kept, *out))


def test_few_batches_are_cut_along_their_first_axis():
    model = nn.Linear(3, 2)
    assert held(model, [torch.randn(40, 3)]) == 10
    assert held(model, [torch.randn(40, 3), torch.randn(12, 3)]) == 13
    assert held(model, [{"input": torch.randn(8, 3)}]) == 2


def test_a_batch_whose_samples_know_of_each_other_stays_whole():
    class Graph(nn.Module):
        def forward(self, x, adjacency):
            return adjacency @ x

    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    assert held(Graph(), [(torch.randn(8, 3), torch.ones(8, 8))]) == 0
    assert held(Centred(), [torch.randn(8, 3)]) == 0


def test_what_has_no_samples_to_part_stays_whole():
    assert held(nn.Linear(3, 2), [torch.randn(1, 3)]) == 0
    assert held(nn.Linear(3, 2), [torch.randn(3)]) == 0

    class Named(nn.Module):
        def forward(self, maps):
            return maps[0]

    assert held(Named(), [[torch.randn(4, 3), torch.randn(4, 2)]]) == 0
    assert held(nn.Bilinear(3, 4, 2), [(torch.randn(8, 3), torch.randn(8, 4))]) == 2
