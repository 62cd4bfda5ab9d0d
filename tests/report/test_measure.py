import copy
import functools
import os
import random
import re
import time
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.example_inputs import ExampleInputs, InputCapture
from lightning_compress.report import measure
from lightning_compress.report.measure import StepTimes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids, scale=1.0):
        return self.head(self.emb(ids)) * scale


# Counts


def test_counts_agree_with_a_plain_loop():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LSTM(8, 4), nn.Linear(4, 2).bfloat16())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter[torch.rand(parameter.shape) < 0.3] = 0.0
        net[0].weight[0, 0, 0, 0] = -0.0
    expected = [
        (name, parameter.numel(), sum(value == 0.0 for value in parameter.flatten().tolist()))
        for name, parameter in net.named_parameters()
    ]
    counts = measure.count_parameters(net)
    assert [(count.name, count.total, count.zeros) for count in counts] == expected
    assert [count.shape for count in counts] == [tuple(parameter.shape) for parameter in net.parameters()]
    assert counts[-1].dtype == "bfloat16"
    assert counts[0].sparsity == expected[0][2] / expected[0][1]


def test_a_shared_parameter_counts_once():
    (count,) = measure.count_parameters(Tied())
    assert (count.name, count.aliases, count.total) == ("emb.weight", ("head.weight",), 80)
    assert measure.count_parameters(Tied(), ["head.weight"]) == [count]
    assert measure.count_parameters(Tied(), []) == []


def test_counts_of_unusual_parameters():
    net = nn.Module()
    net.empty = nn.Parameter(torch.zeros(0, 3))
    net.number = nn.Parameter(torch.tensor(0.0))
    net.integer = nn.Parameter(torch.tensor([0, 1, 2], dtype=torch.int8), requires_grad=False)
    net.lazy = nn.LazyLinear(3)
    counts = {count.name: (count.total, count.zeros, count.sparsity) for count in measure.count_parameters(net)}
    assert counts == {"empty": (0, 0, 0.0), "number": (1, 1, 1.0), "integer": (3, 1, 1 / 3)}


def test_counts_use_the_names_that_users_wrote():
    net = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert [count.name for count in measure.count_parameters(net)] == ["0.weight", "0.bias"]


# Bytes


def test_file_size_is_that_of_the_file(tmp_path):
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    size = measure.file_size(state)
    assert abs(size.stored - os.path.getsize(tmp_path / "a.pt")) <= 512  # the archive's inner name and its alignment
    deflated = len(zlib.compress((tmp_path / "a.pt").read_bytes()))
    assert abs(size.deflated - deflated) <= 0.02 * deflated
    assert measure.file_size(state, deflate=False) == measure.FileSize(size.stored)


def test_checkpoint_zeros(tmp_path):
    model = Tied()
    with torch.no_grad():
        model.emb.weight[:5] = 0.0
    counts = measure.count_parameters(model)
    path = str(tmp_path / "a.ckpt")
    torch.save({"state_dict": model.state_dict()}, path)
    assert measure.checkpoint_zeros(measure.read_checkpoint(path), counts) == (20, 80)
    torch.save({"state_dict": {"_orig_mod.head.weight": model.head.weight}}, path)
    assert measure.checkpoint_zeros(measure.read_checkpoint(path), counts) == (20, 80)
    torch.save({"state_dict": {}}, path)
    assert measure.checkpoint_zeros(measure.read_checkpoint(path), counts) == (0, 0)


# Inputs


def test_resized_inputs():
    x, mask = torch.arange(6).view(3, 2), torch.tensor([True, False, True])
    inputs = ExampleInputs(({"x": x, "pair": (mask, None)}, torch.tensor(2.0)), {"scale": 0.5})
    assert inputs.batch == 3
    one, seven = inputs.resized(1), inputs.resized(7)
    assert one.args[0]["x"].tolist() == [[0, 1]]
    assert seven.args[0]["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5], [0, 1]]
    assert seven.args[0]["pair"][0].tolist() == [True, False, True, True, False, True, True]
    assert seven.args[0]["pair"][1] is None
    assert seven.args[1].item() == 2.0
    assert seven.kwargs == {"scale": 0.5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no tensor"),
        ((torch.tensor(1.0), 3), "no tensor"),
        ((torch.zeros(0, 3),), "no tensor with a batch"),
        ((torch.zeros(8, 3), torch.zeros(5, 5)), "share no batch dimension: dimension 0 is 5 and 8"),
        ((torch.zeros(8, 3), object()), "type object"),
    ],
)
def test_inputs_without_a_batch(args, message):
    with pytest.raises(ValueError, match=message):
        ExampleInputs(args).resized(4)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (torch.zeros(2), (1, {})),
        ((torch.zeros(2), torch.zeros(2)), (2, {})),
        ([torch.zeros(2), torch.zeros(2)], (1, {})),
        ({"ids": torch.zeros(2)}, (0, {"ids"})),
    ],
)
def test_example_input_array_is_read_as_lightning_reads_it(example, expected):
    inputs = ExampleInputs.from_example(example)
    assert (len(inputs.args), set(inputs.kwargs)) == (expected[0], set(expected[1]))


def hooks(module):
    return sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules())


def test_capture_keeps_the_first_call_with_its_keywords():
    model = Tied()
    capture = InputCapture(model)
    ids = torch.arange(100) % 20
    model(ids, scale=2.0)
    ids.zero_()
    model(torch.zeros(3, dtype=torch.long))
    capture.remove()
    name, inputs = capture.result()
    assert name == ""
    assert inputs.args[0].tolist() == (torch.arange(64) % 20).tolist()
    assert inputs.kwargs == {"scale": 2.0}
    assert hooks(model) == 0


def test_capture_finds_the_one_child_that_is_called():
    holder = nn.Module()
    holder.net, holder.accuracy, holder.loss = nn.Linear(3, 2), MulticlassAccuracy(2), nn.CrossEntropyLoss()
    capture = InputCapture(holder)
    logits = holder.net(torch.zeros(4, 3))
    holder.loss(logits, torch.zeros(4, dtype=torch.long))
    holder.accuracy(logits, torch.zeros(4, dtype=torch.long))
    capture.remove()
    assert capture.result()[0] == "net"


@pytest.mark.parametrize("own", [False, True])
def test_capture_sees_a_forward_that_is_called_past_all_hooks(own):
    model = Tied()
    if own:  # something else stands in for the forward already
        model.forward = functools.partial(Tied.forward, model)
    before = dict(vars(model))
    first, capture = InputCapture(model), InputCapture(model)  # as a report and a pruning callback have them
    copied = copy.deepcopy(model)
    copied.forward(torch.arange(7))
    first.remove()
    with pytest.raises(ValueError, match="was not seen"):
        first.result()
    assert torch.equal(model.forward(torch.arange(5), scale=2.0), 2.0 * Tied.forward(model, torch.arange(5)))
    model(torch.arange(3))
    capture.remove()
    name, inputs = capture.result()
    assert (name, inputs.args[0].tolist(), inputs.kwargs) == ("", list(range(5)), {"scale": 2.0})
    assert vars(model).get("forward") is before.get("forward")
    assert hooks(model) == 0


def test_capture_names_what_it_cannot_choose_from():
    holder = nn.Module()
    holder.encoder, holder.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
    capture = InputCapture(holder)
    with pytest.raises(ValueError, match="the forward of Module was not seen"):
        capture.result()
    holder.decoder(holder.encoder(torch.zeros(4, 3)))
    capture.remove()
    with pytest.raises(ValueError, match="'encoder' and 'decoder'"):
        capture.result()


def test_capture_gives_compiled_modules_no_hook():
    holder = nn.Module()
    holder.wrapped = torch.compile(nn.Linear(3, 2), backend="eager")
    holder.in_place = nn.Linear(3, 2)
    holder.in_place.compile(backend="eager")
    capture = InputCapture(holder)
    assert hooks(holder.wrapped) == hooks(holder.in_place) == 0
    capture.remove()


# Time


class Sleeper(nn.Module):
    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds, self.calls, self.seen = seconds, 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return x


def test_latency_is_measured_in_eval_mode_without_gradients():
    model = Sleeper(0.01)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled())))
    start = time.perf_counter()
    latency = measure.median_latency(model, ExampleInputs((torch.zeros(1),)), budget=0.15)
    assert time.perf_counter() - start < 1.0
    assert 0.01 <= latency.fastest <= latency.seconds < 0.1
    assert 2 <= latency.repeats <= 15
    assert set(seen) == {(False, False)}
    assert model.training
    assert (model.calls, model.seen) == (0, [])  # what forward did to the module is undone


def test_a_slow_forward_is_measured_once_and_never_at_a_batch_that_takes_too_long(monkeypatch):
    model, inputs = Sleeper(0.05), ExampleInputs((torch.zeros(1),))
    assert measure.median_latency(model, inputs, budget=0.01).repeats == 1
    monkeypatch.setattr(measure, "_TOO_LONG", 1.0)
    latencies = measure.measure_latencies(model, inputs, "cpu")
    assert latencies["1"]["ms"] >= 50
    assert latencies["64"]["ms"] is None
    assert re.match(r"one forward would take about [3-9] s", latencies["64"]["left_out"])


def test_a_disturbed_measurement_is_repeated_and_the_lowest_median_counts(monkeypatch):
    given = []

    def measured(*args, **kwargs):
        return measure.Latency(*given.pop(0))

    monkeypatch.setattr(measure, "median_latency", measured)
    inputs = ExampleInputs((torch.zeros(1),))
    given += [(0.003, 9, 0.001), (0.001, 9, 0.001), (0.2, 9, 0.2), (0.3, 9, 0.3), (0.09, 9, 0.09)]
    latencies = measure.measure_latencies(nn.Identity(), inputs, "cpu")
    assert [latencies[batch]["ms"] for batch in ("1", "64")] == [1.0, 90.0]
    assert not latencies["1"]["unsure"]
    assert not given
    given += [(0.003, 9, 0.001), (0.004, 9, 0.001), (0.005, 9, 0.001), (1.0, 1, 1.0)]
    latencies = measure.measure_latencies(nn.Identity(), inputs, "cpu")
    assert [latencies[batch]["unsure"] for batch in ("1", "64")] == [True, True]
    assert not given


def test_a_forward_that_fails_says_so():
    model = nn.Sequential(nn.Flatten(0), nn.Linear(3, 2))  # works at batch 1 alone
    latencies = measure.measure_latencies(model, ExampleInputs((torch.zeros(5, 3),)), "cpu")
    assert latencies["1"]["ms"] > 0
    assert latencies["64"]["ms"] is None
    assert latencies["64"]["left_out"].startswith("RuntimeError: ")
    assert model.training


class Restless(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.mean, self.accuracy = MeanMetric(), MulticlassAccuracy(3, average="micro")
        self.register_buffer("count", torch.zeros(()))
        self.trail, self.cache, self.tensor, self.number = [1], {"a": 1}, torch.zeros(2), 0

    def forward(self, x):
        self.norm.train()
        y = self.norm(x) + torch.rand(3) + random.random() + np.random.rand()  # noqa: NPY002
        self.mean.update(y)
        self.accuracy(torch.rand(len(x), 3), torch.zeros(len(x), dtype=torch.long))
        self.count += 1
        self.trail.append(2)
        self.cache["b"] = y
        self.tensor.add_(1.0)
        self.number += 1
        self.fresh = y
        return y


def test_a_module_and_the_random_numbers_are_left_as_they_were():
    torch.manual_seed(0)
    model = Restless()
    model.norm.eval()
    x = torch.rand(4, 3)
    model(x)
    del model.fresh
    model.norm.eval()
    trail, keys = model.trail, set(model.__dict__)

    def state():
        values = [*model.norm.state_dict().values(), model.count, model.mean.mean_value, model.mean.weight]
        values += [model.accuracy.tp, model.tensor]
        plain = [model.number, model.trail[:], sorted(model.cache), model.mean.update_count]
        return [value.clone() for value in values], plain, [child.training for child in model.modules()]

    tensors, plain, training = state()
    randoms = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measure.median_latency(model, ExampleInputs((x,)), repeats=5)
    tensors_after, plain_after, training_after = state()
    assert all(torch.equal(a, b) for a, b in zip(tensors, tensors_after, strict=True))
    assert (plain, training) == (plain_after, training_after)
    assert model.trail is trail
    assert set(model.__dict__) == keys
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert np.random.get_state()[1].tolist() == randoms[2]  # noqa: NPY002


def test_a_model_that_raises_is_left_as_it_was():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            raise RuntimeError("no")

    model = Raises()
    with pytest.raises(RuntimeError, match="no"):
        measure.median_latency(model, ExampleInputs((torch.zeros(1),)))
    assert (model.calls, model.training) == (0, True)


def test_a_compiled_module_is_measured_uncompiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph.forward

    net = nn.Sequential(torch.compile(nn.Linear(3, 2), backend=backend))
    net(torch.zeros(4, 3))
    assert len(compilations) == 1
    measure.measure_latencies(net, ExampleInputs((torch.zeros(4, 3),)), "cpu")
    net(torch.zeros(4, 3))
    assert len(compilations) == 1


def test_step_times_stay_small():
    times = StepTimes(warmup=10, most=100)
    for i in range(5000):
        times.add(100.0 if i < 10 else float(i % 7))
    assert len(times._times) <= 100
    assert times.count == 4990
    assert times.median() == pytest.approx(3.0, abs=1.0)
    assert StepTimes().median() is None
    short = StepTimes()
    for seconds in (5.0, 5.0, 1.0, 1.0):
        short.add(seconds)
    assert (short.median(), short.count) == (1.0, 2)


def test_plain_value():
    value = measure.plain_value(
        {1: np.float32(0.5), "a": torch.ones(2, dtype=torch.int64), "b": {2}, "c": float("inf"), "d": torch.float32}
    )
    assert value == {"1": 0.5, "a": [1, 1], "b": [2], "c": None, "d": "torch.float32"}
    assert type(value["1"]) is float
