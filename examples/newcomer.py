"""A network of one's own from training to an ONNX file: own model, own data, own training loop.

    python examples/newcomer.py

Nothing here belongs to tenfold but five calls: compress, its summary, save, load and export. The tutorial
`docs/tutorials/own_model.md` goes through it block by block.
"""

import time
from itertools import pairwise

import onnxruntime
import torch
from torch import nn

import tenfold

SIDE, KINDS = 16, ("disc", "square", "cross", "stripes")


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy pictures (count, 1, SIDE, SIDE), each of one kind at some place and size, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(KINDS), (count,), generator=generator)
    middle = 5 + 6 * torch.rand(count, 2, 1, 1, generator=generator)
    radius = 2.5 + 2 * torch.rand(count, 1, 1, generator=generator)
    down, right = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    y, x = (down - middle[:, 0]).abs(), (right - middle[:, 1]).abs()
    square = torch.maximum(x, y) <= radius
    kinds = (
        x**2 + y**2 <= radius**2,
        square,
        square & (torch.minimum(x, y) <= 1),
        square & (down % 3 == 0),
    )
    clean = torch.stack(kinds)[labels, torch.arange(count)].float()
    noise = 0.3 * torch.randn(clean.shape, generator=generator)
    return (clean + noise)[:, None], labels


class Shapes(nn.Module):
    """Four convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 48, 48)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.classify = nn.Linear(48, len(KINDS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores (count, kinds) of pictures."""
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < 2:
                x = nn.functional.max_pool2d(x, 2)
        return self.classify(x.mean(dim=(2, 3)))


def train(model: nn.Module, epochs: int, lr: float) -> None:
    """Train in place, as anybody would."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * 24)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for rows in order.chunk(24):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the share of the test pictures that are classified correctly."""
    return (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()


torch.manual_seed(0)
images, labels = pictures(1536, seed=1)
test_images, test_labels = pictures(1000, seed=2)
model = Shapes()
train(model, epochs=4, lr=0.01)
print(f"trained: {accuracy(model):.1%} of the test pictures are right")

small = tenfold.compress(
    model,
    images[:1],  # what a forward takes
    "macs=0.3",  # of the whole model
    data=images[:1024].split(128),  # without labels: what enters the layers
    tune=lambda compressed: train(compressed, epochs=4, lr=0.002),  # our own loop again
    evaluate=accuracy,
    runtime=tenfold.Runtime(measure=False),  # we measure the ONNX files below
)
print(small.summary())
assert small.record.after.macs <= 0.3 * small.record.before.macs
assert small.record.scores["tuned"] > small.record.scores["original"] - 0.02

small.save("shapes-small")
loaded, plan = tenfold.load(Shapes(), "shapes-small")  # onto a freshly built network: no pickle
with torch.no_grad():
    wanted = small.model(test_images)
    assert torch.equal(loaded.eval()(test_images), wanted)  # bit for bit

for name, network in (("shapes", model), ("shapes-small", loaded)):
    tenfold.export(network, images[:1], f"{name}.onnx", overwrite=True)
sessions = {name: onnxruntime.InferenceSession(f"{name}.onnx") for name in ("shapes", "shapes-small")}


def answer(name: str) -> torch.Tensor:
    """Return what a file answers to the test pictures; nothing of torch or tenfold runs in it."""
    session = sessions[name]
    (out,) = session.run(None, {session.get_inputs()[0].name: test_images.numpy()})
    return torch.from_numpy(out)


assert (answer("shapes-small") - wanted).abs().max() < 1e-4 * wanted.abs().max()
right = {name: (answer(name).argmax(1) == test_labels).float().mean().item() for name in sessions}

seconds: dict[str, list[float]] = {name: [] for name in sessions}
for _ in range(10):  # in turns, so that whatever else the machine does hits both
    for name, taken in seconds.items():
        start = time.perf_counter()
        answer(name)
        taken.append(time.perf_counter() - start)
gain = min(seconds["shapes"]) / min(seconds["shapes-small"])
before, after = small.record.before, small.record.after
print(f"parameters: {before.params:,} became {after.params:,}; MACs: {before.macs:,} became {after.macs:,}")
print(f"right in ONNX Runtime: {right['shapes']:.1%} became {right['shapes-small']:.1%}, {gain:.2f} times as fast")
