"""Layers of very many outputs, and those that no gradient reaches: what is known of them, and what it takes."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tenfold.calibration import calibrate
from tenfold.calibration.collect import measurable
from tenfold.calibration.gradients import GradientSums, collect_gradients
from tenfold.calibration.last_layer import LastLayer
from tenfold.calibration.needs import statistics_bytes
from tenfold.calibration.unused import unused_layers
from tenfold.decompositions import Sketch, covariance
from tenfold.errors import CalibrationWarning
from tenfold.pipeline import compress
from tenfold.records import Calibration
from tenfold.runtime import Event, Runtime
from tenfold.tracing.inputs import call_model

few_rows = pytest.mark.filterwarnings("ignore:.*saw fewer rows:tenfold.errors.CalibrationWarning")


def dense(gram: Tensor | Sketch) -> Tensor:
    return gram.dense() if isinstance(gram, Sketch) else gram


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 3)), (300, 6)),
        (nn.Sequential(nn.Conv1d(4, 40, 3, groups=2), nn.Flatten(), nn.Linear(40, 2)), (300, 4, 3)),
    ],
    ids=["linear", "grouped"],
)
def test_a_sketch_with_a_row_for_every_direction_is_the_matrix(model: nn.Module, shape: tuple[int, ...]) -> None:
    specs, x = {"0": measurable(model)["0"]}, torch.randn(shape)
    collect = partial(collect_gradients, model, [x[:100], x[100:]], specs)
    wanted, found = collect()["0"], collect(widest=8)["0"]
    assert isinstance(wanted, Tensor)
    assert isinstance(found, Sketch)
    assert found.rows.shape[1] < wanted.shape[-1] / 2
    torch.testing.assert_close(dense(found), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_the_diagonal_of_a_sketch_is_exact_and_what_it_adds_is_never_too_much() -> None:
    model, x = nn.Sequential(nn.Linear(16, 60)), torch.randn(500, 16)  # its gradients have full rank
    wanted, found = (collect_gradients(model, [x], measurable(model), widest=w)["0"] for w in (None, 20))
    assert isinstance(found, Sketch)
    torch.testing.assert_close(found.diagonal(), dense(wanted).diagonal(dim1=-2, dim2=-1), rtol=1e-5, atol=0)
    lacking = dense(wanted)[0] - found.rows[0].mT @ found.rows[0]
    assert float(torch.linalg.eigvalsh(lacking)[0]) > -1e-4 * float(found.diagonal().max())


@few_rows
def test_nothing_of_a_vocabulary_is_squared() -> None:
    model = nn.Sequential(nn.Embedding(20_000, 8), nn.Linear(8, 20_000), nn.ReLU(), nn.Linear(20_000, 10))
    known = calibrate(model.eval(), [torch.randint(0, 20_000, (4, 8))])
    for path, own in known.items():
        held = (
            [own.mean, *own.input_second_moment.tensors().values()]
            if isinstance(own.input_second_moment, Sketch)
            else []
        )
        gram = own.output_gram
        held += [] if not isinstance(gram, Sketch) else list(gram.tensors().values())
        assert sum(t.numel() * t.element_size() for t in held) <= statistics_bytes(measurable(model)[path]) < 1 << 30
    assert isinstance(known["1"].output_gram, Sketch)
    assert isinstance(known["3"].output_gram, Tensor)


class Branches(nn.Module):
    """Two layers on the way to the outputs, one that runs without gradients, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.blind, self.idle = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.blind(x)
        self.idle(x)
        return self.b(torch.relu(self.a(x))) + seen


def test_layers_that_no_gradient_reaches_leave_the_others_as_they_are() -> None:
    model, batches = Branches().eval(), [torch.randn(100, 6) for _ in range(3)]
    specs = measurable(model)
    with (
        pytest.warns(CalibrationWarning, match=r"no gradient .* 1 of 4 layers \(blind\)"),
        pytest.warns(CalibrationWarning, match=r"1 of 4 layers \(idle\) run and are not used"),
    ):
        known = calibrate(model, batches, specs)
    alone = calibrate(model, batches, {path: specs[path] for path in ("a", "b")})
    for path in ("a", "b"):
        torch.testing.assert_close(known[path].output_gram, alone[path].output_gram)
    cost = {}
    for path, own in known.items():
        weight = model.get_submodule(path).weight.detach().double()[None]
        cost[path] = own.distortion(weight, torch.zeros_like(weight))
    assert cost["blind"] == pytest.approx(max(cost["a"], cost["b"]))
    assert cost["idle"] == 0
    assert [path for path, own in known.items() if not own.judged] == ["idle"]


def test_a_layer_that_is_not_used_stays_and_says_so() -> None:
    model, data = Branches().eval(), [torch.randn(100, 6) for _ in range(3)]
    recipe = {"budget": "macs=0.75", "keep_ends": False}
    with pytest.warns(CalibrationWarning, match="They stay as they are"):
        plan = compress(model, data[0][:1], recipe, data=data, runtime=Runtime(measure=False)).plan
    assert plan.layer("idle").format is None
    assert "on no sample do the outputs depend on this layer" in str(plan.layer("idle").reason)


def test_layers_are_used_where_the_outputs_are_others_without_what_they_say() -> None:
    model = Branches().eval()
    assert unused_layers(model, ["a", "b", "blind", "idle"], [torch.randn(4, 6)]) == {"idle"}
    assert unused_layers(model, ["idle"], [torch.randn(4, 6)]) == {"idle"}
    assert unused_layers(model, ["a"], []) == set()


def test_a_model_without_trainable_parameters_is_measured_like_any_other() -> None:
    model, batches = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), [torch.randn(50, 6)]
    wanted = calibrate(model, batches)
    found = calibrate(model.requires_grad_(requires_grad=False), batches)
    for path in wanted:
        torch.testing.assert_close(found[path].output_gram, wanted[path].output_gram)


def test_what_it_takes_is_said_before_and_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    model, events = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)), []

    def keep(event: Event) -> None:
        events.append(event)

    with caplog.at_level(logging.INFO, logger="tenfold"):
        compress(
            model.eval(),
            torch.zeros(1, 64),
            {"budget": {"macs": 0.7}, "keep_ends": False},
            data=[torch.randn(500, 64)],
            runtime=Runtime(measure=False, max_cache="1MiB", on_event=keep),
        )
    (note,) = [event.note for event in events if event.note]
    assert note in caplog.messages
    assert "3 layers" in note
    assert "activations 0.6 MiB" in note  # what the first ReLU takes and returns for 400 samples, in both models
    known = calibrate(model, [torch.randn(500, 64)])
    for path, own in known.items():
        held = sum(t.numel() * 8 for t in vars(own).values() if isinstance(t, Tensor))
        assert 0.9 < held / statistics_bytes(measurable(model)[path]) <= 1


class Head(nn.Module):
    """Words, a layer, and a head of many words; ``loss`` returns something that is made of the outputs besides."""

    def __init__(self, loss: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(1500, 12)
        self.body = nn.Sequential(nn.Linear(12, 1100), nn.Tanh(), nn.Linear(1100, 12))
        self.head, self.loss = nn.Linear(12, 1500), loss

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(self.words(ids))))
        return {"logits": logits, "loss": logits.logsumexp(-1).mean()} if self.loss else {"logits": logits}


def test_a_last_layer_of_a_vocabulary_is_left_out_and_says_the_same() -> None:
    model = Head().eval()
    ids = torch.randint(0, 1500, (4, 500, 8))
    batches = [{"input_ids": own, "attention_mask": torch.ones(500, 8).long()} for own in ids]
    for batch in batches:
        batch["attention_mask"][:, 5:] = 0
        batch["ids"] = batch.pop("input_ids")
    specs = {path: spec for path, spec in measurable(model).items() if path != "words"}
    last, calls = LastLayer.of(model, batches[0], call_model), []
    assert last is not None
    assert last.path == "head"
    found = {}
    for name, own in (("left out", last), ("run", None)):
        with GradientSums(model, specs, last=own) as sums:
            watch = model.head.register_forward_hook(lambda *_: calls.append(name))  # noqa: B023
            for batch in batches * 2:
                sums.add(model, batch)
            watch.remove()
        found[name] = {path: dense(gram) for path, gram in sums.mean().items()}
    wanted = found["run"]["body.2"]
    torch.testing.assert_close(found["left out"]["body.2"], wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))
    torch.testing.assert_close(found["left out"]["head"], 5 * torch.eye(1500).double()[None])  # of 5 real tokens each
    torch.testing.assert_close(
        found["run"]["head"].diagonal(dim1=1, dim2=2).mean(), torch.tensor(5.0).double(), rtol=0.01, atol=0
    )


def noted(runs: list[int], _module: nn.Module, _args: object, output: Tensor) -> None:
    if output.is_contiguous():  # and not what stands in for outputs that nobody computes
        runs.append(output[..., 0].numel())


@pytest.mark.parametrize("padded", [False, True])
def test_labels_drawn_behind_a_vocabulary_are_as_good_for_a_quarter_of_the_positions(padded: bool) -> None:
    model = Head().eval()
    nn.init.normal_(model.head.weight)  # predictions that differ from uniform
    batches = [{"ids": own} for own in torch.randint(0, 1500, (4, 500, 8))]
    if padded:
        mask = (torch.arange(8) < 5).long().expand(500, 8)
        batches = [own | {"attention_mask": mask} for own in batches]
    specs = {path: spec for path, spec in measurable(model).items() if path.startswith("body")}
    last, found, runs = LastLayer.of(model, batches[0], call_model), {}, list[int]()
    for name, own in (("left out", last), ("run", None)):
        with GradientSums(model, specs, last=own, loss="fisher") as sums:
            watch = model.head.register_forward_hook(partial(noted, runs))
            for batch in batches * 4:
                sums.add(model, batch)
            watch.remove()
        found[name] = dense(sums.mean()["body.2"])
        assert sum(runs) == {"left out": 1, "run": 4}[name] * 500 * (5 if padded and own is not None else 8) * 4
        runs.clear()
    scale = float(found["run"].abs().max())
    torch.testing.assert_close(found["left out"], found["run"], rtol=0.1, atol=0.05 * scale)
    known = calibrate(model, batches, specs=specs, settings=Calibration(loss="fisher"))
    assert known["body.2"].held_out is not None


def test_a_layer_that_something_else_is_made_of_runs() -> None:
    batch = torch.randint(0, 1500, (3, 8))
    assert LastLayer.of(Head(loss=True), batch, call_model) is None
    watched = Head()
    watched.head.register_forward_hook(lambda *_: None)
    assert LastLayer.of(watched, batch, call_model) is None
    assert LastLayer.of(nn.Sequential(Head().words, Head().head, nn.Softmax(-1)), batch, call_model) is None


def test_outputs_that_change_their_kind_are_differentiated_as_they_are() -> None:
    class Odd(Head):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            found = super().forward(ids)
            return found if len(ids) > 5 else {"logits": found["logits"] * 2}

    torch.manual_seed(0)
    model = Odd().eval()
    batches = [torch.randint(0, 1500, (6, 64)) for _ in range(7)] + [torch.randint(0, 1500, (5, 64))]
    found = calibrate(model, batches)["body.2"]
    assert found.count == 64 * 47
    assert found.judged


def test_a_head_is_judged_by_what_enters_it_as_by_what_it_puts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 4))
    batches = [torch.randn(200, 6) for _ in range(8)]
    wanted = calibrate(model, batches)["2"].held_out
    monkeypatch.setattr(covariance, "WIDE_OUTPUTS", 8)
    found = calibrate(model, batches)["2"].held_out
    assert wanted is not None
    assert found is not None
    for one, other in ((found.predicted, wanted.predicted), (found.measured, wanted.measured)):
        assert one[0] == pytest.approx(other[0], rel=0.02)
        assert one[5] == pytest.approx(other[5], rel=0.1)
