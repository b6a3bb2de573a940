"""The latency table under a fake timer: drift, cache, time bound, interpolation. No test looks at real time."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.formats import FORMATS
from tenfold.profiling import LatencyTable, best_memory_format, to_memory_format
from tenfold.profiling.latency.cache import LatencyCache
from tenfold.profiling.latency.layer_timer import LayerTimer
from tenfold.profiling.latency.lookup_table import REFERENCE
from tenfold.records import Call, ContractSpec, JsonCache, LayerSpec, chain_macs

CONV = LayerSpec(kind="conv", in_channels=64, out_channels=64, kernel=(3, 3), padding=(1, 1))
CALLS = (Call(in_shape=(1, 64, 14, 14)),)


@dataclass
class Problem:
    spec: LayerSpec = CONV
    formats: tuple[str, ...] = ("tucker2",)
    calls: tuple[Call, ...] = CALLS


class FakeTimer:
    """Time = overhead + multiplications, on a machine that gets ``drift`` times slower with every look at the clock."""

    def __init__(self, drift: float = 1.0, noise: float = 0.0) -> None:
        self.asked: list[tuple] = []
        self.drift, self.noise, self.speed = drift, noise, 1.0
        self.rng = np.random.default_rng(0)

    def __call__(self, spec, in_shape):
        self.asked.append((spec, in_shape))
        self.speed *= self.drift
        return self.speed * true_ms(spec, in_shape) * float(np.exp(self.noise * self.rng.normal()))


def true_ms(spec, in_shape):
    return 0.01 + spec.macs(in_shape) / 2e7


def chain_ms(format, spec, in_shape, rank):
    total, shape = 0.0, in_shape
    for stage in FORMATS.get(format).structure(spec, rank):
        total += true_ms(stage, shape)
        shape = stage.out_shape(shape)
    return total


def clock(timer=None, **options):
    return LatencyTable(**({"cache": None, "timer": timer or FakeTimer(), "threads": 1} | options))


@pytest.mark.parametrize("format", ["tucker2", "spatial", "low_rank"])
def test_predictions_follow_the_truth_at_every_rank(format):
    subject, kind = clock(), FORMATS.get(format)
    subject.prepare([Problem(formats=(format,))])
    ranks = [r for r in kind.rank_family(CONV) if kind.macs(CONV, r, CALLS[0].in_shape) < CONV.macs(CALLS[0].in_shape)]
    truth = [chain_ms(format, CONV, CALLS[0].in_shape, r) for r in ranks]
    np.testing.assert_allclose(subject.predict(format, CONV, CALLS, ranks), truth, rtol=0.05)
    assert subject.layer_ms(CONV, CALLS) == pytest.approx(true_ms(CONV, CALLS[0].in_shape))


def test_unprepared_predictions_are_measured_when_asked_for():
    predicted = clock().predict("tucker2", CONV, CALLS, [{"out": 24, "in": 16}])
    assert predicted[0] == pytest.approx(chain_ms("tucker2", CONV, CALLS[0].in_shape, {"out": 24, "in": 16}), rel=0.1)


def test_time_never_falls_with_a_rank_under_noise():
    subject = clock(FakeTimer(noise=0.5))
    subject.prepare([Problem()])
    for name in ("out", "in"):
        ranks = [{"out": 32, "in": 32} | {name: r} for r in range(8, 64)]
        assert (np.diff(subject.predict("tucker2", CONV, CALLS, ranks)) >= -1e-12).all()


def test_drift_is_divided_out():
    steady, drifting = clock(), clock(FakeTimer(drift=1.01))
    for subject in (steady, drifting):
        subject.prepare([Problem()])
    assert drifting._timer.speed > 5  # the machine got that much slower meanwhile
    ranks = [{"out": r, "in": r} for r in (8, 16, 32)]
    ratio = drifting.predict("tucker2", CONV, CALLS, ranks) / steady.predict("tucker2", CONV, CALLS, ranks)
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.02)
    assert ratio[0] == pytest.approx(1, abs=0.1)


def test_calls_add_up():
    twice = (Call(in_shape=(1, 64, 14, 14), count=2), Call(in_shape=(1, 64, 7, 7)))
    subject = clock()
    assert subject.layer_ms(CONV, twice) == pytest.approx(
        2 * true_ms(CONV, (1, 64, 14, 14)) + true_ms(CONV, (1, 64, 7, 7))
    )
    one = [subject.predict("tucker2", CONV, (c,), [{"out": 8, "in": 8}])[0] for c in twice]
    assert subject.predict("tucker2", CONV, twice, [{"out": 8, "in": 8}])[0] == pytest.approx(2 * one[0] / 2 + one[1])


def test_no_time_still_times_dense_layers_and_predicts(caplog):
    timer = FakeTimer()
    subject = clock(timer, seconds=0)
    with caplog.at_level(logging.WARNING, "tenfold"):
        subject.prepare([Problem()])
        predicted = subject.predict("tucker2", CONV, CALLS, [{"out": 8, "in": 8}, {"out": 32, "in": 32}])
    asked = {(s, i) for s, i in timer.asked}
    assert asked == {(CONV, CALLS[0].in_shape), (REFERENCE.spec, REFERENCE.in_shape)}
    assert 0 < predicted[0] < predicted[1] < subject.layer_ms(CONV, CALLS)
    assert "in proportion to the dense layer" in caplog.text


def test_the_time_bound_holds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tenfold.profiling.latency.lookup_table.time.perf_counter", lambda: now[0])

    class Slow(FakeTimer):
        def __call__(self, spec, in_shape):
            now[0] += 0.5
            return super().__call__(spec, in_shape)

    subject = clock(Slow(), seconds=10)
    subject.prepare([Problem(), Problem(spec=CONV.core(64, 32))])
    assert now[0] < 10 + 5 * 0.5 + 2 * 1.5  # the reference's warm-up, and one sample begun in time


def test_coarse_points_come_first_and_progress_is_told():
    told = []
    timer = FakeTimer()
    subject = clock(timer, progress=lambda done, total: told.append((done, total)), repeats=2)
    subject.prepare([Problem()])
    measured = [p for p in dict.fromkeys(timer.asked) if p != (REFERENCE.spec, REFERENCE.in_shape)]
    coarse = {(p.spec, p.in_shape) for p in subject._grid(("tucker2", CONV, CALLS[0].in_shape)).levels[0]}
    assert measured[0] == (CONV, CALLS[0].in_shape)
    coarse.discard(measured[0])  # full rank is the dense layer
    assert set(measured[1 : len(coarse) + 1]) == coarse
    assert told[-1][0] == told[-1][1]


def test_a_second_clock_measures_nothing_that_the_first_did(tmp_path):
    clock(cache=tmp_path).prepare([Problem()])
    (file,) = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["conditions"]["threads"] == 1
    assert stored["conditions"]["torch"] == torch.__version__
    timer = FakeTimer()
    again = clock(timer, cache=tmp_path)
    again.prepare([Problem()])
    rank = {"out": 16, "in": 16}
    assert again.predict("tucker2", CONV, CALLS, [rank])[0] == pytest.approx(
        chain_ms("tucker2", CONV, CALLS[0].in_shape, rank), rel=0.02
    )
    assert {(s, i) for s, i in timer.asked} <= {(REFERENCE.spec, REFERENCE.in_shape)}


def test_other_conditions_have_other_tables(tmp_path):
    for options in ({}, {"threads": 2}, {"memory_format": "channels_last"}, {"dtype": torch.bfloat16}):
        clock(cache=tmp_path, **options).layer_ms(CONV, CALLS)
        clock(cache=tmp_path, **options).prepare([])
    subjects = [clock(cache=tmp_path, **o) for o in ({}, {"threads": 2}, {"memory_format": "channels_last"})]
    assert len({s._cache.path for s in subjects}) == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "conditions": {}, "points": 3}', "\0"]
)
def test_a_damaged_cache_is_measured_anew(tmp_path, text, caplog):
    clock(cache=tmp_path).prepare([Problem()])
    (file,) = tmp_path.glob("*.json")
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "tenfold"):
        clock(cache=tmp_path).prepare([Problem()])
    assert json.loads(file.read_text())["entries"]


@pytest.mark.parametrize("value", ["-1", "0", "NaN", "Infinity", '"x"', "null"])
def test_stored_nonsense_is_refused(tmp_path, value, caplog):
    cache = LatencyCache(tmp_path, {"device": "cpu"})
    cache.save({"a": [1.0]})
    cache.path.write_text(cache.path.read_text().replace("1.0", value))
    with caplog.at_level(logging.WARNING, "tenfold"):
        assert cache.load() == {}
        assert cache.load() == {}
    assert len(caplog.records) == 1


def test_a_cache_that_cannot_be_written_warns_once(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = LatencyCache(blocked, {"device": "cpu"})
    with caplog.at_level(logging.WARNING, "tenfold"):
        cache.save({"a": [1.0]})
        cache.save({"a": [1.0]})
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_what_another_process_stored_meanwhile_is_kept(tmp_path):
    first, second = (LatencyCache(tmp_path, {"device": "cpu"}) for _ in range(2))
    first.save({"a": [1.0]})
    second.save({"b": [2.0]})
    assert first.load() == {"a": [1.0], "b": [2.0]}


def test_two_processes_that_store_at_once_lose_nothing(tmp_path, monkeypatch):
    first, second = (LatencyCache(tmp_path, {"device": "cpu"}) for _ in range(2))
    other = threading.Thread(target=second.save, args=({"b": [2.0]},))
    load = JsonCache.load

    def interrupted(cache):
        there = load(cache)
        if threading.current_thread() is not other:
            other.start()  # between reading and writing
            other.join(0.1)
        return there

    with monkeypatch.context() as patched:
        patched.setattr(JsonCache, "load", interrupted)
        first.save({"a": [1.0]})
    other.join(10)
    assert first.load() == {"a": [1.0], "b": [2.0]}


def test_learned_factors_correct_all_ranks_of_the_geometry():
    subject = clock()
    rank = {"out": 16, "in": 16}
    before = subject.predict("tucker2", CONV, CALLS, [rank, {"out": 32, "in": 16}])
    dense = subject.layer_ms(CONV, CALLS)
    subject.learn("tucker2", CONV, CALLS[0].in_shape, rank, 1.5 * before[0] / dense)
    np.testing.assert_allclose(subject.predict("tucker2", CONV, CALLS, [rank, {"out": 32, "in": 16}]), 1.5 * before)


def test_what_was_never_measured_takes_the_mean_of_what_was_until_it_is():
    subject, other = clock(), CONV.core(64, 32)
    rank = {"out": 16, "in": 16}
    place = CALLS[0].in_shape
    of_other = chain_ms("tucker2", other, place, rank)
    assert subject.predict("tucker2", other, CALLS, [rank])[0] == pytest.approx(of_other, rel=0.1)
    ratio = subject.predict("tucker2", CONV, CALLS, [rank])[0] / subject.layer_ms(CONV, CALLS)
    subject.learn("tucker2", CONV, place, rank, 1.5 * ratio)
    assert subject.predict("tucker2", other, CALLS, [rank])[0] == pytest.approx(1.5 * of_other, rel=0.1)
    subject.learn("tucker2", other, place, rank, of_other / subject.layer_ms(other, CALLS))
    assert subject.predict("tucker2", other, CALLS, [rank])[0] == pytest.approx(of_other, rel=0.1)


def test_corrections_have_a_limit():
    subject = clock()
    rank = {"out": 16, "in": 16}
    before = subject.predict("tucker2", CONV, CALLS, [rank])
    subject.learn("tucker2", CONV, CALLS[0].in_shape, rank, 1000.0)
    np.testing.assert_allclose(subject.predict("tucker2", CONV, CALLS, [rank]), 2 * before)


class Sleeper(nn.Module):
    """A convolution with a geometry, and time spent outside of it; a fake clock that both move on."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)
        self.inner.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 3.0))
        self.now = now

    def forward(self, x):
        x = self.inner(x)
        self.now[0] += 1.0
        return x


def test_the_share_of_layers_is_taken_within_forwards(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tenfold.profiling.latency.measure.time.perf_counter", lambda: now[0])
    share = clock().share_of_layers(Sleeper(now), torch.zeros(1, 2, 3, 3), [], seconds=50)
    assert share == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (CONV, (1, 64, 5, 5)),
        (LayerSpec(kind="conv_transpose", in_channels=4, out_channels=6, kernel=(2,)), (2, 4, 7)),
        (LayerSpec(kind="embedding", in_channels=10, out_channels=3), (2, 40)),
        (ContractSpec(modes=(4, 6), equation="...ab,cb->...ac", weight_shape=(5, 6)), (7, 24)),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_real_timer_runs_every_kind_of_stage(spec, shape, memory_format):
    assert LayerTimer("cpu", torch.float32, memory_format)(spec, shape) > 0


def test_memory_formats_change_the_layout_and_nothing_else():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    moved, moved_x = to_memory_format(net, x, "channels_last")
    assert moved[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert moved_x.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.is_contiguous()
    torch.testing.assert_close(moved(moved_x), net(x))
    name, comparison = best_memory_format(net, x, seconds=0.05)
    assert set(comparison.latencies) == {"contiguous", "channels_last"}
    assert comparison.latencies[name].median_ms == min(v.median_ms for v in comparison.latencies.values())


def test_chain_of_a_chart_point_is_what_the_layer_runs():
    rank = {"out": 16, "in": 24}
    structure = FORMATS.get("tucker2").structure(CONV, rank)
    assert chain_macs(structure, CALLS[0].in_shape) == FORMATS.get("tucker2").macs(CONV, rank, CALLS[0].in_shape)


@pytest.mark.parametrize(
    ("format", "rank", "unseen"),
    [
        ("tensor_ring", {"r1": 4, "r2": 10, "r3": 10}, {"r1": 64, "r2": 10, "r3": 10}),
        ("block_term", {"blocks": 4, "out": 10, "in": 10}, {"blocks": 63, "out": 2, "in": 2}),
    ],
)
def test_slices_and_groups_are_timed_for_each_number_of_them(format, rank, unseen):
    subject = clock()
    subject.prepare([Problem(formats=(format,))])
    near, other = subject.predict(format, CONV, CALLS, [rank, unseen])
    assert near == pytest.approx(chain_ms(format, CONV, CALLS[0].in_shape, rank), rel=0.1)
    # No sampled rank has so many slices or blocks: their stage is taken in proportion to the dense layer.
    assert other == pytest.approx(chain_ms(format, CONV, CALLS[0].in_shape, unseen), rel=0.5)


def test_stages_of_which_no_kind_was_sampled_are_taken_in_proportion_to_the_dense_layer(caplog):
    spec = LayerSpec(kind="conv", in_channels=24, out_channels=40, kernel=(3, 5), padding=(1, 2))
    calls = (Call(in_shape=(4, 24, 4, 4)),)
    ranks = [{"r1": r1, "r2": r, "r3": r} for r1 in (2, 4, 8) for r in (1, 3, 6)]
    with caplog.at_level(logging.WARNING, "tenfold"):
        found = clock().predict("tensor_ring", spec, calls, ranks)
    assert "taken in proportion" in caplog.text
    assert found == pytest.approx([chain_ms("tensor_ring", spec, calls[0].in_shape, r) for r in ranks], rel=0.5)


@pytest.mark.parametrize("format", ["cp3", "cp4", "spatial", "low_rank", "tucker2", "tucker_cp"])
@pytest.mark.parametrize("step", [1, 16])
def test_many_ranks_at_once_take_what_each_takes_alone(format, step):
    """A sub-layer with as many inputs as outputs lies on two lines, and the depthwise ones of all ranks on one."""

    def blocks(spec, in_shape):
        return 0.01 + 1e-3 * -(-spec.out_channels // step) * -(-spec.in_channels // spec.groups // step)

    spec = LayerSpec(kind="conv", in_channels=16, out_channels=16, kernel=(3, 3), padding=(1, 1))
    table = LatencyTable(cache=None, threads=1, timer=blocks, step=max(step, 8))
    calls = (Call(in_shape=(2, 16, 8, 8)),)
    names = FORMATS.get(format).rank_names
    ranks = [FORMATS.get(format).check_rank(spec, dict.fromkeys(names, r)) for r in (16, 8, 12, 4)]
    ranks += [{"rank": 32}, {"rank": 48}] if names == ("rank",) and format.startswith("cp") else []
    together = table.predict(format, spec, calls, ranks)
    assert together == pytest.approx([table.predict(format, spec, calls, [rank])[0] for rank in ranks])
