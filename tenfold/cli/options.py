"""The groups of options that commands share: the model, what to do with it, how to recover, what to time and write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

_MODEL, _DECIDE, _RECOVER, _MACHINE = "Model and data", "What to do with the layers", "Recovery", "Machine"
UseData = Literal["sequential", "layers", "norms"]
TASK_FORMS = (
    "NAME[:VARIANT], pkg.module:Class or file.py:Class; or a model alone: timm:NAME, torchvision:NAME, "
    "hf:FOLDER_OR_ID. See `tenfold list tasks`."
)


@dataclass(frozen=True)
class Source:
    """Which model, with which weights, and where its data is."""

    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            metavar="TASK",
            help=f"A model, its data, its score: {TASK_FORMS} May be left out with a --checkpoint that knows it.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights of the dense model, as .safetensors; with hf: also a folder.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A compressed model, as `compress` wrote it.", rich_help_panel=_MODEL),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the data is; else $TENFOLD_DATA, else ~/.cache/tenfold/datasets. With timm: and torchvision: a "
            "folder of pictures to calibrate with, with hf: a text file, a sentence a line (or pictures).",
            rich_help_panel=_MODEL,
        ),
    ] = None


@dataclass(frozen=True)
class Machine:
    """Where to compute, and with which seed."""

    seed: Annotated[
        int, typer.Option(min=0, help="Of everything that draws random numbers.", rich_help_panel=_MACHINE)
    ] = 0
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps ...", rich_help_panel=_MACHINE)
    ] = "cpu"
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; as many as torch chooses.", rich_help_panel=_MACHINE)
    ] = None


@dataclass(frozen=True)
class Decide:
    """How much of which layer to keep."""

    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="macs=0.5,latency=0.6",
            help="What the whole model may cost in params, macs, latency: shares up to 1, absolute numbers (ms) above.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="How ranks are chosen: global (the default), ratio, energy, fixed ...; see `tenfold list rules`.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the rule, such as rel_error=0.3. Repeatable.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    rank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=RANK",
            help="A rank by hand (rule fixed): 'layer1.*=24' or 'conv1=out:24,in:20'. The first match wins.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="What layers may turn into, the preferred first: tucker2,low_rank,spatial; see `list formats`.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT=NAME",
            help="What finds the factors of a format, instead of its default: tucker2=hosvd; see `list algorithms`. "
            "Repeatable.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave these layers alone: a path, a glob or re:EXPRESSION. Repeatable.",
            rich_help_panel=_DECIDE,
        ),
    ] = None
    keep_ends: Annotated[
        bool | None,
        typer.Option(
            "--keep-ends/--no-keep-ends",
            help="Leave a cheap first and last layer alone; by default unless the rule names layers.",
            rich_help_panel=_DECIDE,
            show_default=False,
        ),
    ] = None
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="For inference: merge batch norm into the layers in the end. Latencies are those of folded models.",
            rich_help_panel=_DECIDE,
        ),
    ] = False
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Carry out this plan, edited or not, instead of making one.",
            rich_help_panel=_DECIDE,
        ),
    ] = None


@dataclass(frozen=True)
class Data:
    """Which data to look at, and what for."""

    calibration: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Training samples to look at, without labels; 0 for none. Default: 2000, or as many as there are.",
            rich_help_panel=_RECOVER,
            show_default=False,
        ),
    ] = None
    use_data: Annotated[
        UseData,
        typer.Option(
            help="What they are for. sequential: ranks by what the output loses, layers fitted front to back to the "
            "outputs of the original. layers: each layer on its own. norms: batch norm only, estimated anew.",
            rich_help_panel=_RECOVER,
        ),
    ] = "sequential"


@dataclass(frozen=True)
class Recover:
    """What to do for the accuracy after the layers were replaced."""

    tune_epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Epochs of fine-tuning; by default what the task recommends.",
            rich_help_panel=_RECOVER,
            show_default=False,
        ),
    ] = None
    no_tune: Annotated[bool, typer.Option("--no-tune", help="No fine-tuning.", rich_help_panel=_RECOVER)] = False
    label_free: Annotated[
        bool,
        typer.Option(
            "--label-free",
            help="Tune on the --calibration samples by the dense model's answers alone; labels are never read.",
            rich_help_panel=_RECOVER,
        ),
    ] = False
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Score the model on the test set.", rich_help_panel=_RECOVER)
    ] = True


@dataclass(frozen=True)
class Training:
    """Settings of the fine-tuning; what is left out comes from the task."""

    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate.", rich_help_panel=_RECOVER, show_default=False),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per step of tuning.", rich_help_panel=_RECOVER, show_default=False),
    ] = None
    distill: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of the dense model's answers in the loss; the labels have the rest. Left out: labels alone.",
            rich_help_panel=_RECOVER,
            show_default=False,
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option(min=1, help="Temperature of the distillation.", rich_help_panel=_RECOVER)
    ] = 4.0


@dataclass(frozen=True)
class Timing:
    """Whether and on what to measure milliseconds."""

    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Measure milliseconds too.", rich_help_panel=_MACHINE)
    ] = True
    latency_batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Batch size to measure with.", rich_help_panel=_MACHINE)
    ] = 1


@dataclass(frozen=True)
class Writing:
    """Whether and where to write."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where to write the model, replacing an earlier checkpoint. Default: compressed-TASK.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Decide and show the plan; write nothing.", rich_help_panel="Output")
    ] = False
