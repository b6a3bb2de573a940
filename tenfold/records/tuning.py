"""Fine-tuning configuration and results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tenfold.records.base import Record, Seed


class TuneConfig(Record):
    """Configuration of fine-tuning. The defaults suit a few epochs after compression.

    Use it with ``finetune``; ``epochs`` and ``lr`` matter most.

    Attributes:
        epochs: passes over the batches; 0 trains nothing.
        optimizer: "sgd" (with Nesterov momentum) or "adamw".
        lr: peak learning rate, after the warm-up; a tenth to a hundredth of that of the original training.
        momentum: of SGD; β₁ of AdamW.
        weight_decay: on weights only, never on biases and norms.
        decay_factors: whether weight decay acts on factors too, where it silently lowers their rank.
        warmup: share of all steps with a linearly rising learning rate; it then falls as a cosine.
        label_smoothing: of the default loss.
        freeze_norms: whether batch norms normalize by their running statistics and keep them, as in evaluation; scales
            and shifts are trained. For models that are nearly right already: against a teacher, the noise of batch
            statistics then outweighs the remaining error.
        clip_norm: largest norm of the whole gradient; None for no limit.
        autocast: "bf16", "off", or "auto": bf16 for float32 models on hardware with bf16 arithmetic.
        channels_last: True, False, or "auto": if the model has 2-d convolutions and runs with such inputs.
        train_as: "dense" multiplies the factors of a layer out once per forward and trains through the dense layer that
            they make, "factors" through the factors as they are: the same function and the same gradients. "auto" is
            the first where it saves a tenth of the time, by a few steps of each before the first epoch: the clock
            then decides the last bits. The config of the result says which it was; give that to repeat a run exactly.
        batch_size: samples per batch, for the caller who makes the batches; the loop itself does not use it.
        accumulate: batches per step, their gradients averaged: a larger batch than fits into memory.
        ema: decay of the exponential moving average of the weights, such as 0.999; the average is then scored after
            each epoch and is the final model. None for no average.
        seed: of all randomness of an epoch, together with its number.

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
    train_as: Literal["auto", "dense", "factors"] = "auto"
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Seed = 0

    @classmethod
    def gentle(cls, **settings: Any) -> TuneConfig:
        """Return a configuration for models that are nearly right already, such as data-aware fits, with a teacher.

        Adam instead of SGD: factors have steep and flat directions, and no one learning rate of SGD suits both. Batch
        norm uses its running statistics, and nothing decays. ``settings`` override all this.

        Example:
            >>> TuneConfig.gentle(epochs=12).freeze_norms
            True
        """
        return cls(**GENTLE | settings)


GENTLE: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.0, "freeze_norms": True}


class EpochRecord(Record):
    """One complete epoch.

    Attributes:
        epoch: counted from 1.
        loss: mean over the batches, of all processes.
        lr: learning rate of the last step.
        score: result of ``evaluate`` after the epoch; None without it.
        seconds: training, without evaluation.
    """

    epoch: PositiveInt
    loss: float
    lr: float
    score: float | None = None
    seconds: float = 0.0


class TuneResult(Record):
    """History of fine-tuning; the model itself was trained in place.

    Attributes:
        config: of the run, with what ``train_as: auto`` came to.
        history: one record per epoch, including those of earlier, interrupted calls.
        resumed: how many of them were restored from the folder.
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
        """Seconds of training in all epochs, including those of earlier, interrupted calls."""
        return sum(record.seconds for record in self.history)
