"""Gradients of the cross-entropy with labels drawn from a model's predictions: samples of its Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 64  # of a vocabulary's predictions at a time
_SEEN = 4  # of as many positions in front of a vocabulary, labels are drawn for one


def by_drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient (..., words) of the summed cross-entropy with labels drawn from logits (..., words).

    Labels are drawn by the inverse of the cumulative distribution: ``torch.multinomial`` draws a number for each word
    of a vocabulary, which takes as long as the network.
    """
    gradient = logits.float().softmax(-1).flatten(0, -2)
    places = torch.rand(len(gradient), 1, generator=generator).to(gradient)
    for own, place in zip(gradient.split(_ROWS), places.split(_ROWS), strict=True):
        cumulated = own.cumsum(-1)
        drawn = torch.searchsorted(cumulated, place * cumulated[:, -1:], right=True).clamp_max(own.shape[-1] - 1)
        own.scatter_add_(-1, drawn, own.new_full(drawn.shape, -1.0))
    return gradient.to(logits).view_as(logits)


@torch.no_grad()
def labels_sent_back(head: nn.Linear, entered: Tensor, generator: torch.Generator) -> Tensor:
    """Return that gradient at what enters a head of very many words (positions, in), whose logits are never all there.

    The head is most of the work of a small language model. Labels of positions are independent, so that those of a
    random quarter, twice as large, have the second moments of all.
    """
    seen = torch.randperm(len(entered), generator=generator)[: -(-len(entered) // _SEEN)].to(entered.device)
    gradient, scale = torch.zeros_like(entered), (len(entered) / len(seen)) ** 0.5
    weight = head.weight.float()
    for rows in seen.split(_ROWS):
        at_logits = by_drawn_labels(head(entered[rows]).float(), generator)
        gradient[rows] = (scale * (at_logits @ weight)).to(gradient)
    return gradient
