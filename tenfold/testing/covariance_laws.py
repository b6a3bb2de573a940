"""Laws of algorithms that use the covariance of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.decompositions import Fit, Moments, decompose, default_algorithm
from tenfold.formats import Rank, join_groups, split_groups
from tenfold.records import LayerSpec
from tenfold.testing.laws import expect, law
from tenfold.testing.trials import LOCAL_SLACK, SLACK, Trial
from tenfold.testing.weights import random_factors, random_weight, some_ranks

# What is left of the error of a blind fit, at most, where factors of the rank make the output without any.
_GAIN = 0.5


@dataclass(frozen=True)
class _Seen:
    """A weight that has some rank where the data are, and another one, as large, where they are not."""

    spec: LayerSpec
    rank: Rank
    weight: Tensor  # in torch's own layout
    rows: Tensor  # (groups, N, n)

    @classmethod
    def of(cls, trial: Trial) -> _Seen | None:
        """Return a weight at a small rank, half of whose inputs' directions never occur; None where there is none."""
        spec, generator = trial.at.spec, torch.Generator().manual_seed(9)
        ranks = some_ranks(trial.format, spec, 5)
        if len(ranks) < 3:
            return None
        known = random_factors(trial.format, spec, ranks[1]).to_grouped().flatten(2)
        groups, _, width = known.shape
        draw = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(draw).Q[..., : max(width // 2, 1)]  # other directions in each group
        other = split_groups(random_weight(spec, seed=8), spec).flatten(2)
        hidden = other - other @ basis @ basis.mT
        size = torch.linalg.vector_norm(known @ basis, dim=(1, 2), keepdim=True)
        hidden = hidden * size / torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True).clamp_min(1e-12)
        seen = torch.randn(groups, 4 * width, basis.shape[-1], generator=generator, dtype=torch.float64)
        rows = seen @ basis.mT + basis.sum(-1).unsqueeze(1)
        weight = join_groups((known + hidden).view(spec.group_shape), spec)
        return cls(spec, ranks[1], weight, rows)

    def group(self, index: int) -> _Seen:
        """Return one group as a layer of its own."""
        spec, n = self.spec, self.spec.groups
        alone = spec.replace(groups=1, in_channels=spec.in_channels // n, out_channels=spec.out_channels // n)
        own = split_groups(self.weight, spec)[index : index + 1]
        return _Seen(alone, self.rank, join_groups(own, alone), self.rows[index : index + 1])

    def errors(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """Return Σ‖y − ŷ‖² and Σ‖y − ȳ‖² over the rows (groups,), with the bias shifted as the fit says."""
        shift = torch.zeros(1) if fit.bias_shift is None else fit.bias_shift
        wanted = self.rows @ split_groups(self.weight, self.spec).flatten(2).mT
        found = self.rows @ fit.value.to_grouped().flatten(2).mT + shift.view(self.spec.groups, 1, -1)
        return (wanted - found).square().sum((1, 2)), (wanted - wanted.mean(1, keepdim=True)).square().sum((1, 2))


def _fit(trial: Trial, at: _Seen) -> Fit:
    name, moments = trial.format.name(), Moments.of(at.rows)
    return decompose(at.weight, name, at.rank, trial.algorithm, spec=at.spec, moments=moments)


def check_white(trial: Trial) -> None:
    """Raise LawBroken if inputs that are white and centred make the fit worse than it is without any."""
    if not trial.algorithm.uses_covariance:
        return
    spec = trial.at.spec
    weight, ranks = random_weight(spec, seed=2), some_ranks(trial.format, spec)
    groups, _, *rest = spec.group_shape
    width = torch.Size(rest).numel()
    eye = torch.eye(width, dtype=torch.float64).expand(groups, -1, -1)
    white = Moments(eye, torch.zeros(groups, width, dtype=torch.float64), 10 * width)
    rank = ranks[len(ranks) // 2]
    with law(15, trial, rank, "white inputs"):
        plain = trial.fit(weight, rank)
        seen = decompose(weight, trial.format.name(), rank, trial.algorithm, spec=spec, moments=white)
        slack = SLACK if trial.format.svd_bounds_error else LOCAL_SLACK
        most = plain.rel_error * (1 + slack) + 1e-4
        expect(seen.rel_error <= most, f"relative error {seen.rel_error:.6g}, without moments {plain.rel_error:.6g}")


def check_outputs(trial: Trial) -> None:
    """Raise LawBroken unless errors where there are no data are traded for those of the outputs, and reported truly.

    Of each group, the output errors are clearly below those of a fit that does not know the data.
    """
    at = _Seen.of(trial) if trial.algorithm.uses_covariance else None
    if at is None:
        return
    with law(15, trial, at.rank, "inputs in half of all directions"):
        fit = _fit(trial, at)
        missed, power = at.errors(fit)
        claimed, seen = fit.output_error or 0.0, float(missed.sum() / power.sum()) ** 0.5
        expect(
            abs(claimed - seen) <= 1e-6,
            f"the fit reports the output error {claimed:.6g}, over the rows it is {seen:.6g}",
        )
        blind = default_algorithm(trial.format.name())
        moments = Moments.of(at.rows)
        plain, _ = at.errors(decompose(at.weight, trial.format.name(), at.rank, blind, spec=at.spec, moments=moments))
        for own, without, whole in zip(missed.sqrt(), plain.sqrt(), power.sqrt(), strict=True):
            least = 0.02 * float(whole)
            gain = 1 + LOCAL_SLACK if trial.algorithm.structured else _GAIN  # a structure may fit no data
            expect(
                float(own) <= max(gain * float(without), least),
                f"output error {float(own / whole):.4g} in a group, of a fit without data {float(without / whole):.4g}",
            )


def check_groups_apart(trial: Trial) -> None:
    """Raise LawBroken if a group comes out worse beside groups with other inputs than as a layer of its own."""
    at = _Seen.of(trial) if trial.algorithm.uses_covariance and trial.at.spec.groups > 1 else None
    if at is None:
        return
    missed, power = at.errors(_fit(trial, at))
    slack = SLACK if trial.format.svd_bounds_error else LOCAL_SLACK
    for index in range(at.spec.groups):
        with law(15, trial, at.rank, f"group {index}"):
            own = at.group(index)
            alone, _ = own.errors(_fit(trial, own))
            seen, wanted = (float(e / power[index]) ** 0.5 for e in (missed[index], alone[0]))
            expect(seen <= wanted * (1 + slack) + 1e-2, f"output error {seen:.6g}, as a layer of its own {wanted:.6g}")


def check_output_gram(trial: Trial) -> None:
    """Raise LawBroken if factors come out with scales that train badly where outputs count very differently."""
    at = _Seen.of(trial) if trial.algorithm.uses_covariance else None
    if at is None:
        return
    groups, out = at.spec.group_shape[:2]
    output_gram = torch.logspace(0, -4, out, dtype=torch.float64).diag_embed().expand(groups, -1, -1)
    moments = Moments.of(at.rows).replace(output_gram=output_gram)
    with law(15, trial, at.rank, "outputs that count very differently"):
        found = decompose(at.weight, trial.format.name(), at.rank, trial.algorithm, spec=at.spec, moments=moments).value
        pairs = zip(found.tensors().items(), found.balanced().tensors().values(), strict=True)
        for (name, given), wanted in ((pair, even) for pair, even in pairs if even.is_floating_point()):
            norms, levelled = (torch.linalg.vector_norm(t.flatten(2), dim=(1, 2)) for t in (given, wanted))
            off = float((norms / levelled.clamp_min(1e-30)).log().abs().max())
            expect(off <= 1e-4, f"{name} has the norm {norms.tolist()}, balanced {levelled.tolist()}")


COVARIANCE_LAWS: dict[str, Callable[[Trial], None]] = {
    "white": check_white,
    "outputs": check_outputs,
    "groups_apart": check_groups_apart,
    "output_gram": check_output_gram,
}
