"""What a fine-tuning run is told, and what it tells."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tenfold.records import Record


class TuneConfig(Record):
    """How to fine-tune. The defaults suit a network that was just compressed and is to be trained for a few epochs.

    Attributes:
        epochs: passes over the batches; 0 trains nothing.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        lr: highest learning rate, reached after the warm-up; a tenth to a hundredth of that of the original training.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: pull towards zero; never on biases and norms.
        decay_factors: whether it acts on the factors of factorized layers too, where it silently lowers their rank.
        warmup: share of all steps during which the learning rate rises in a straight line; then it falls as a cosine.
        label_smoothing: share of the target spread over all classes, in the default loss.
        freeze_norms: whether batch norms normalize by their running statistics and keep them, as in evaluation; scales
            and shifts are trained. For models that answer nearly as they should: against a teacher, the noise of the
            statistics of each batch then outweighs what is left to learn.
        clip_norm: largest norm of the whole gradient, None for no limit.
        autocast: "bf16", "off", or "auto": bf16 for float32 models where the hardware computes in it.
        channels_last: True, False, or "auto": where the model has 2-d convolutions and runs with such inputs.
        batch_size: samples per batch, for those who make the batches; the loop takes them as they come.
        accumulate: batches per step, their gradients averaged: a larger batch than the memory holds.
        ema: decay of the exponential moving average of the weights, such as 0.999, which is then what is scored after
            each epoch and what the model ends with; None for none.
        seed: of everything random in an epoch, together with the number of the epoch.

    Example:
        >>> TuneConfig(epochs=3, lr=0.05).replace(optimizer="adamw").optimizer
        'adamw'
    """

    epochs: NonNegativeInt = 3
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    decay_factors: bool = False
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze_norms: bool = False
    clip_norm: PositiveFloat | None = 5.0
    autocast: Literal["auto", "bf16", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: NonNegativeInt = 0

    @classmethod
    def gentle(cls, **settings: Any) -> TuneConfig:
        """Return how to train what answers nearly as it should already, such as fits to data, towards its teacher.

        Adam instead of SGD, whose rate would have to be lower for the steep than it is of use for the flat directions
        of factors; batch norm by its running statistics; no decay. ``settings`` come first.

        Example:
            >>> TuneConfig.gentle(epochs=12).freeze_norms
            True
        """
        return cls(**GENTLE | settings)


GENTLE: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.0, "freeze_norms": True}


class EpochRecord(Record):
    """One epoch that is complete.

    Attributes:
        epoch: counted from 1.
        loss: mean over the batches, of all processes.
        lr: learning rate of the last step.
        score: what ``evaluate`` said after the epoch; None without it.
        seconds: training, without evaluation.
    """

    epoch: PositiveInt
    loss: float
    lr: float
    score: float | None = None
    seconds: float = 0.0


class TuneResult(Record):
    """What fine-tuning did; the model itself was trained in place.

    Attributes:
        config: what it was told.
        history: one record per epoch, those of earlier, interrupted calls included.
        resumed: how many of them were taken from the folder.
    """

    config: TuneConfig
    history: tuple[EpochRecord, ...] = ()
    resumed: int = 0

    @property
    def score(self) -> float | None:
        """The score after the last epoch."""
        return self.history[-1].score if self.history else None

    @property
    def seconds(self) -> float:
        """Seconds of training in all epochs, those of earlier, interrupted calls included."""
        return sum(record.seconds for record in self.history)
