"""Samples are held out whole, and only from batches whose samples do not know of each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.pipeline import compress
from tenfold.runtime import Runtime
from tenfold.tracing.samples import count_samples, parted, samples_in


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


class Graphs:
    """Graphs in one object, as PyTorch Geometric batches them: no tensor, container or dataclass."""

    def __init__(self, sizes, width=3):
        generator = torch.Generator().manual_seed(len(sizes))
        self.num_graphs = len(sizes)
        self.batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.x = torch.randn(sum(sizes), width, generator=generator)
        self.edge_index = torch.arange(sum(sizes)).repeat(2, 1)


def test_graphs_are_counted_and_not_their_nodes():
    made = [Graphs([5, 2, 4]), Graphs([1, 9])]
    assert count_samples(made) == 5
    parts = [(one.x, one.edge_index, one.batch) for one in made]
    assert count_samples(parts) == 5
    assert count_samples([{"x": x, "edge_index": e, "batch": b} for x, e, b in parts]) == 5
    assert count_samples([(x, e) for x, e, _ in parts]) == 21  # of one graph, nodes are the samples
    steps = torch.zeros(11, dtype=torch.long)
    assert samples_in((parts[0][0], steps)) == 11  # numbers without edges are of something else
    assert samples_in((parts[0][0], parts[0][1], torch.arange(11).flip(0))) == 11


@pytest.mark.parametrize("whole", [True, False])
def test_agreement_is_that_of_graphs(whole):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.nodes, self.head = nn.Linear(3, 16), nn.Linear(16, 2)

        def forward(self, x, edge_index=None, batch=None):
            if whole:
                x, edge_index, batch = x.x, x.edge_index, x.batch
            seen = torch.relu(self.nodes(x[edge_index[0]]))
            return self.head(torch.zeros(int(batch.max()) + 1, 16).index_add(0, batch, seen))

    made = [Graphs([3 + i % 4, 2, 5]) for i in range(20)]
    data = made if whole else [(one.x, one.edge_index, one.batch) for one in made]
    net = Net().eval()
    recipe = {"budget": "macs=0.7", "keep_ends": False, "calibration": {"held_out": 0.1}}
    found = compress(net, data[0], recipe, data=data, runtime=Runtime(measure=False)).record.agreement
    assert found.samples == found.rows == 2 * 3  # two of the batches, of three graphs each


def test_what_has_no_samples_to_part_stays_whole():
    assert held(nn.Linear(3, 2), [torch.randn(1, 3)]) == 0
    assert held(nn.Linear(3, 2), [torch.randn(3)]) == 0

    class Named(nn.Module):
        def forward(self, maps):
            return maps[0]

    assert held(Named(), [[torch.randn(4, 3), torch.randn(4, 2)]]) == 0
    assert held(nn.Bilinear(3, 4, 2), [(torch.randn(8, 3), torch.randn(8, 4))]) == 2
