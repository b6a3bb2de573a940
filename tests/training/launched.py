"""What test_accelerate.py launches in two processes: each scenario's outcome goes into the folder given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tenfold.cli.launch import leave
from tenfold.training import TuneConfig, TuneProgress, finetune

PLAIN = TuneConfig(epochs=3, lr=0.1, warmup=0.2, autocast="off", channels_last=False, clip_norm=0.5)


def blobs(n: int = 64) -> tuple[Tensor, Tensor]:
    """Four classes around four corners."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (n,), generator=generator)
    return torch.stack([y % 2, y // 2], 1) * 4.0 + torch.randn(n, 2, generator=generator) * 0.3, y


def batches_of(size: int) -> Any:
    """Return batches as a function of the epoch: always the same order of samples."""

    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        x, y = blobs()
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(size)
        return [(x[i], y[i]) for i in order]

    return batches


def mlp(*, norm: bool = False) -> nn.Sequential:
    """Without batch norm and dropout two processes compute what one does; with both they do not."""
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(2, 16), *between, nn.Linear(16, 4))


class Cut(Exception):  # noqa: N818
    pass


def noisy(epoch: int) -> Any:
    """Yield augmented batches: drawn from the global generator one by one, as training draws its dropout masks."""
    for x, y in batches_of(8)(epoch):
        yield x + 0.1 * torch.randn(x.shape), y


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator()
    found: dict[str, Any] = {"processes": accelerator.num_processes}

    def keep(name: str, model: nn.Module, **facts: Any) -> None:
        own = torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])
        every = accelerator.gather(own).view(accelerator.num_processes, -1)
        found[name] = {"same": bool((every == every[0]).all()), **facts}
        if accelerator.is_main_process:
            save_file(model.state_dict(), folder / f"{name}.safetensors")

    model = mlp()
    told = finetune(model, batches_of(8), PLAIN, accelerator=accelerator)
    keep("doubled", model, losses=[r.loss for r in told.history], plain=sorted(set(vars(model)) - set(vars(mlp()))))

    model = mlp()
    told = finetune(model, batches_of(4), PLAIN.replace(accumulate=2), accelerator=accelerator)
    keep("accumulated", model, losses=[r.loss for r in told.history])

    config = PLAIN.replace(ema=0.9)
    model, seen = mlp(norm=True), []

    def score(model: nn.Module) -> float:
        return model[1].running_mean.sum().item() + accelerator.process_index

    told = finetune(
        model,
        noisy,
        config,
        accelerator=accelerator,
        evaluate=score,
        folder=folder / "whole",
        progress=TuneProgress(seen.append),
    )
    keep("whole", model, scores=[r.score for r in told.history], seen=len(seen))
    model = mlp(norm=True)
    calls: list[int] = []

    def cut(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise Cut
        return score(model)

    try:
        finetune(model, noisy, config, accelerator=accelerator, evaluate=cut, folder=folder / "cut")
    except Cut:
        told = finetune(model, noisy, config, accelerator=accelerator, evaluate=score, folder=folder / "cut")
    keep("resumed", model, resumed=told.resumed, scores=[r.score for r in told.history])

    _, y = blobs(44)
    loader = DataLoader(TensorDataset(torch.arange(44.0)[:, None].expand(44, 2), y), batch_size=8, shuffle=True)
    drawn: list[Tensor] = []

    def note(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        drawn.append(inputs[:, 0])
        return nn.functional.cross_entropy(model(inputs / 44), targets)

    finetune(mlp(), loader, PLAIN.replace(epochs=1), accelerator=accelerator, loss=note)
    every = gather_object([torch.cat(drawn).tolist()])
    found["loader"] = {"drawn": every}
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
