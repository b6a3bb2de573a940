"""Knowledge distillation: match the logits of teachers, and features where shapes agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tenfold.errors import TuningError
from tenfold.registry import as_names
from tenfold.tracing.contexts import evaluating
from tenfold.tracing.inputs import call_model
from tenfold.training.losses import logits_of


class Distillation:
    """A loss for ``finetune`` that matches the student to a teacher, usually the original model.

    Use it without labels (``share=1``), where labels are few, or where they alone do not bring the score back.

    With student and teacher logits s and t, labels y, share a and temperature T (Hinton, Vinyals & Dean 2015,
    arXiv 1503.02531), and features f of m named modules, b their weight:

        (1 − a) · CE(s, y) + a · T² · KL(softmax(t/T) ‖ softmax(s/T)) + b/m · Σ ‖f_s/‖f_s‖ − f_t/‖f_t‖‖²

    Norms are per sample. Decomposition preserves numbers of channels, so features need no adapter. At ``share=1``
    labels are never read: recovery without labels, with any targets.

    Teachers run in eval mode without gradients, and are not part of the student. The probabilities of several teachers
    at temperature T are averaged.

    Args:
        teacher: one model or several, on the device of the student, with the student's inputs. None: the targets of
            the batches are pairs (labels, logits (samples, teachers, classes)), as ``CachedLogits`` gives them.
        share: a, the share of the teacher in the loss, 0 to 1.
        temperature: T ≥ 1; higher values weigh small probabilities more.
        features: paths of modules, in the student and in the first teacher, whose outputs are compared.
        feature_weight: b ≥ 0.
        label_smoothing: of the labels' cross-entropy.

    Raises:
        TuningError: a number out of its range, no teacher, or a path that a model does not have.

    Example:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> loss = Distillation(teacher, share=1.0)
        >>> x = torch.randn(8, 4)
        >>> abs(float(loss(teacher, x, None).detach())) < 1e-6, bool(loss(student, x, None) > 1e-6)
        (True, True)
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module] | None,
        *,
        share: float = 0.9,
        temperature: float = 4.0,
        features: str | Iterable[str] = (),
        feature_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.teachers = None if teacher is None else _tuple(teacher)
        self.share, self.temperature = share, temperature
        self.features, self.feature_weight = tuple(as_names(features)), feature_weight
        self.label_smoothing = label_smoothing
        if self.teachers == ():
            msg = "there is no teacher: pass a model, or several"
            raise TuningError(msg)
        if not 0 <= share <= 1 or temperature < 1 or feature_weight < 0:
            msg = (
                f"share={share}, temperature={temperature} and feature_weight={feature_weight} must be within 0..1, "
                "at least 1 and at least 0"
            )
            raise TuningError(msg)
        if self.teachers is not None:
            for path in self.features:
                _module(self.teachers[0], path, "teacher")
        elif self.features:
            msg = "features are compared with those of a teacher that runs: pass the teacher, or no features"
            raise TuningError(msg)

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """Return the loss of the student on a batch, a float32 scalar; ``targets`` are not read at ``share=1``."""
        teacher_features: list[Tensor] = []
        with taps(model, self.features, "student") as student_features:
            student = logits_of(call_model(model, inputs))
        if self.teachers is None:
            targets, stored = _stored(targets)
            target = self._soften(stored)
        else:
            target, teacher_features = self._ask(self.teachers, inputs)
        t = self.temperature
        loss = self.share * t * t * F.kl_div((student / t).log_softmax(-1), target, reduction="none").sum(-1).mean()
        if self.share < 1:
            smoothing = self.label_smoothing
            loss = loss + (1 - self.share) * F.cross_entropy(student, targets, label_smoothing=smoothing)
        if self.features:
            distances = [_distance(s, f) for s, f in zip(student_features, teacher_features, strict=True)]
            loss = loss + self.feature_weight * torch.stack(distances).mean()
        return loss

    def _ask(self, teachers: Sequence[nn.Module], inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the softened probabilities of the teachers, and the features of the first."""
        with ExitStack() as stack:
            for teacher in teachers:
                stack.enter_context(evaluating(teacher))
            features = stack.enter_context(taps(teachers[0], self.features, "teacher"))
            logits = torch.stack([logits_of(call_model(teacher, inputs)) for teacher in teachers], dim=1)
            return self._soften(logits), features

    def _soften(self, logits: Tensor) -> Tensor:
        """Return the mean probabilities (samples, classes) of logits (samples, teachers, classes)."""
        return (logits.float() / self.temperature).softmax(-1).mean(1)


@contextmanager
def taps(model: nn.Module, paths: Sequence[str], who: str = "model") -> Iterator[list[Tensor]]:
    """Yield a list that holds the outputs of the modules at ``paths`` after one forward within the context.

    Raises:
        TuningError: the model has no such module.
    """
    found: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            del module, args
            found[path] = output
            if len(found) == len(paths):
                outputs[:] = [found[p] for p in paths]

        return hook

    handles = [_module(model, path, who).register_forward_hook(keep(path)) for path in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _tuple(models: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    return (models,) if isinstance(models, nn.Module) else tuple(models)


def _stored(targets: Any) -> tuple[Any, Tensor]:
    match targets:
        case (labels, Tensor() as logits) if logits.dim() == 3:
            return labels, logits
        case _:
            msg = (
                f"without a teacher the targets must be pairs (labels, logits), not {type(targets).__name__}: train on "
                "CachedLogits(...), or pass the teacher"
            )
            raise TuningError(msg)


def _module(model: nn.Module, path: str, who: str) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        model = model.module
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        msg = f"the {who} has no module {path!r} to compare features at. Its children: {known}."
        raise TuningError(msg) from None


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of normalised features (samples, ...), averaged over samples."""
    if student.shape != teacher.shape:
        msg = (
            f"features have the shapes {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
            "teacher: name modules whose outputs agree"
        )
        raise TuningError(msg)
    ours, theirs = (F.normalize(f.float().flatten(1), dim=1) for f in (student, teacher))
    return (ours - theirs).square().sum(1).mean()
