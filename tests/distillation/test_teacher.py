"""The teacher answers in its own way, and leaves no trace: in the student, in itself, in the random state."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_compress.distillation.teacher import EMATeacher, Teacher, load, merge
from lightning_compress.quantization.insertion import Settings, insert
from tests.helpers import CLASSES, FEATURES, Net, StatefulLoader, TiedNet, held_out, same, seeded, trainer


class Sized(Net):
    """Keeps its width in the checkpoint."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.save_hyperparameters()


class Other(LightningModule):
    """Another architecture, that must be told its size and keeps no hyperparameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Odd(Sized):
    """Keeps a hyperparameter that is no plain value."""

    def __init__(self, width: int = 16, folder: Any = None) -> None:
        super().__init__(width)
        self.save_hyperparameters()


class Noisy(nn.Module):
    """Batch norm and dropout, and noise that it draws in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, *, noise: float = 0.0) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu())) + noise * torch.randn(len(x), 1)


def checkpoint(tmp_path: Path, module: LightningModule, fit: bool = True) -> Path:
    """Train a little and write a checkpoint."""
    run = trainer(tmp_path, max_epochs=1)
    if fit:
        run.fit(module, StatefulLoader(batches=2), held_out())
    else:
        run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    return tmp_path / "teacher.ckpt"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(1))


# --- a guest ----------------------------------------------------------------------------------------------------------


def test_it_stays_in_eval_mode_and_its_statistics_do_not_move(x: Tensor) -> None:
    net = seeded(Noisy)
    net.drop.eval()  # some of it had been set to eval mode by its owner
    flags = {name: part.training for name, part in net.named_modules()}
    before = copy.deepcopy(net.state_dict())
    teacher = Teacher([net])
    teacher.attach("cpu")
    assert not any(part.training for part in net.modules())
    expected = copy.deepcopy(net)(x).detach()
    for member in (net, net.norm):
        member.train()  # somebody's own code
        assert same(teacher((x,), {}), [expected])
        assert not any(part.training for part in net.modules())
    teacher.attach("cpu")  # a second time changes nothing of what is put back
    teacher.detach()
    assert {name: part.training for name, part in net.named_modules()} == flags
    assert same(dict(net.state_dict()), dict(before))


def test_its_answers_carry_no_gradients_and_serve_in_a_loss(x: Tensor) -> None:
    net, student = seeded(Noisy), seeded(Net, 1)
    (output,) = Teacher([net])((x,), {})
    assert not output.requires_grad
    (student(x) * output).sum().backward()  # the product saves the teacher's output for the backward pass
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_the_random_state_stays_though_the_teacher_draws(x: Tensor) -> None:
    teacher = Teacher([seeded(Noisy)])
    quiet, before = teacher((x,), {})[0], torch.get_rng_state()
    noisy = teacher((x,), {"noise": 1.0})[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(noisy, quiet)


def test_a_16_bit_teacher_computes_in_its_precision_and_answers_in_float32() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, FEATURES), nn.Linear(FEATURES, CLASSES)

        def forward(self, ids: Tensor, x: Tensor, mask: Tensor) -> dict[str, Any]:
            seen = [ids.dtype, x.dtype, mask.dtype]
            return {"logits": self.head(self.embed(ids) + x * mask[:, None]), "top": ids.argmax(), "seen": seen}

    net = seeded(Counting).bfloat16()
    ids, x, mask = torch.arange(4), torch.randn(4, FEATURES), torch.tensor([True, False, True, True])
    (output,) = Teacher([net])((ids, x), {"mask": mask})
    assert output["seen"] == [torch.int64, torch.bfloat16, torch.bool]
    assert output["logits"].dtype == torch.float32
    assert output["top"].dtype == torch.int64
    assert torch.equal(output["logits"], net(ids, x.bfloat16(), mask)["logits"].float())


def test_autocast_holds_for_teachers_in_float32_only(x: Tensor) -> None:
    net = seeded(Noisy).eval()
    half, double = copy.deepcopy(net).bfloat16(), copy.deepcopy(net).double()
    for other in (Teacher([half]), Teacher([double])):
        alone = other((x,), {})[0]
        with torch.autocast("cpu", torch.float16):
            assert same(other((x,), {}), [alone])
    assert alone.dtype == torch.float64
    single = Teacher([net])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single((x,), {})[0], net(x).float())
    assert not torch.equal(single((x,), {})[0], net(x).bfloat16().float())


def test_it_follows_the_inputs_to_their_device(x: Tensor) -> None:
    net = seeded(Net)
    teacher = Teacher([net])
    teacher.attach("meta")
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    net = seeded(Net)
    (output,) = Teacher([net])((x.to("meta"),), {})
    assert output.device.type == "meta"
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


def test_a_copy_of_who_refers_to_it_refers_to_it_too(x: Tensor) -> None:
    class Student(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher([seeded(Noisy)])

    student = seeded(Student)
    assert copy.deepcopy(student).teacher is student.teacher
    assert list(student.state_dict()) == list(Net().state_dict())
    ema = EMATeacher(student)
    assert copy.deepcopy(ema) is ema


@pytest.mark.parametrize("is_watched", [False, True])
def test_it_can_be_pickled(x: Tensor, is_watched: bool) -> None:
    teacher = Teacher([seeded(Noisy)])
    teacher.attach("cpu")
    if is_watched:
        teacher.watch(["norm"])
    expected = teacher((x,), {})
    restored = pickle.loads(pickle.dumps(teacher))
    assert same(restored((x,), {}), expected)
    assert same(restored.features(), teacher.features())
    restored.detach()
    assert restored.modules[0].training
    assert not restored.modules[0].norm._forward_hooks


# --- ensembles --------------------------------------------------------------------------------------------------------


def test_the_mean_of_logits_is_the_geometric_mean_of_distributions(x: Tensor) -> None:
    teacher = load([seeded(Noisy, seed) for seed in range(3)], Net())
    outputs = teacher((x,), {})
    distributions = torch.stack([output.double().softmax(1) for output in outputs])
    mean = distributions.prod(0) ** (1 / 3)
    torch.testing.assert_close(merge(outputs).softmax(1).double(), mean / mean.sum(1, keepdim=True))
    assert merge(outputs[:1]) is outputs[0]


def test_members_that_disagree_about_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) from member 0 and \(2, 5\) from member 1"):
        merge([torch.zeros(2, 3), torch.zeros(2, 5)])


def test_features_of_an_ensemble_are_refused() -> None:
    with pytest.raises(ValueError, match="ensemble of 2"):
        Teacher([Noisy(), Noisy()]).watch(["norm"])


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_last_call(x: Tensor) -> None:
    net = seeded(Noisy).eval()
    teacher = Teacher([net.bfloat16()])
    teacher.watch(["norm", "first"])
    for inputs in (x, x[:2]):
        teacher((inputs,), {})
        first = net.first(inputs.bfloat16())
        expected = {"norm": net.norm(first).float(), "first": first.float()}
        assert same({name: value.detach() for name, value in expected.items()}, teacher.features())
    teacher.detach()
    assert not any(part._forward_hooks for part in net.modules())
    assert teacher.features() == {}


def test_the_first_tensor_of_several_is_the_feature() -> None:
    net = nn.Sequential(nn.LSTM(3, 4))
    teacher = Teacher([net])
    teacher.watch(["0"])
    ((output, _),) = teacher((torch.randn(5, 2, 3),), {})
    assert torch.equal(teacher.features()["0"], output)


def test_features_that_cannot_be_had_are_refused(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    net.add_module("idle", nn.ModuleDict({"head": nn.Linear(2, 2)}))
    net.forward = lambda x: net[2](net[1](net[0](x)))
    teacher = Teacher([net])
    with pytest.raises(ValueError, match=r"`features` names 'idle.haed'.* 'idle.head'"):
        teacher.watch(["idle.haed"])
    teacher.watch(["0"])
    teacher((x,), {})
    with pytest.raises(ValueError, match="'0', whose output a later layer of the teacher changes in place"):
        teacher.features()
    teacher.detach()
    teacher.watch(["1", "idle.head"])
    teacher((x,), {})
    net[1].forward = lambda x: net.idle["head"](x[:, :2]) @ torch.ones(2, 8)
    teacher((x,), {})
    assert set(teacher.features()) == {"1", "idle.head"}
    del net[1].forward  # what an earlier call has seen does not count
    teacher((x,), {})
    with pytest.raises(ValueError, match="'idle.head', which the teacher's forward never calls"):
        teacher.features()


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_compiled_teacher(x: Tensor, is_wrapped: bool) -> None:
    torch.compiler.reset()
    net = seeded(Noisy)
    plain = copy.deepcopy(net).eval()
    if is_wrapped:
        compiled = torch.compile(net, backend="eager")
    else:
        compiled = net
        net.compile(backend="eager")
    teacher = Teacher([compiled])
    for _ in range(2):
        assert same(teacher((x,), {}), [plain(x).detach()])
        teacher.watch(["norm"])
        teacher((x,), {})
        assert torch.equal(teacher.features()["norm"], plain.norm(plain.first(x)))
        teacher.detach()
        assert net.training
        assert net.drop.training
    torch.compiler.reset()


# --- what a value means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [True, False])
def test_a_checkpoint_is_loaded_as_the_students_class_with_its_own_width(tmp_path: Path, as_text: bool) -> None:
    big = seeded(lambda: Sized(40))
    path = checkpoint(tmp_path, big)
    student = Sized(8)
    before, other = torch.get_rng_state(), random.getstate()
    teacher = load(str(path) if as_text else path, student)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == other
    (member,) = teacher.modules
    assert type(member) is Sized
    assert same(dict(member.state_dict()), dict(big.state_dict()))


def test_the_class_can_be_given(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, seeded(lambda: Sized(40)))
    dynamic = type("Wrapped", (Net,), {})
    assert type(load(path, dynamic(), cls=Sized).modules[0]) is Sized


def test_a_checkpoint_of_another_class_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Other(3), fit=False)
    way_out = "'_target_': 'my_package.BigNet.load_from_checkpoint', 'checkpoint_path': "
    with pytest.raises(ValueError, match=rf"{path}.* as Sized, .*RuntimeError.*(.|\n)*{way_out}'{path}'"):
        load(path, Sized())
    with pytest.raises(ValueError, match=rf"as Other.*missing 1 required positional argument: 'size'.*{way_out}"):
        load(path, Other(3))
    with pytest.raises(ValueError, match=rf"as Linear.*it is no LightningModule.*{way_out}"):
        load(path, nn.Linear(2, 2))


def test_hyperparameters_that_torch_does_not_trust_are_refused_with_a_way_out_that_works(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Odd(24, random.Random(0)), fit=False)
    with pytest.raises(ValueError, match=r"UnpicklingError(.|\n)*if you trust the file(.|\n)*'weights_only': False"):
        load(path, Odd())
    target = f"{__name__}.Odd.load_from_checkpoint"
    teacher = load({"_target_": target, "checkpoint_path": str(path), "weights_only": False}, Odd())
    assert teacher.modules[0].net[0].out_features == 24


def test_hydra_instantiates_a_mapping() -> None:
    config = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 5}
    for value in (config, OmegaConf.create(config), OmegaConf.create([config])):
        (member,) = load(value, Net()).modules
        assert (type(member), member.out_features) == (nn.Linear, 5)
    with pytest.raises(ValueError, match="a dict without `_target_`"):
        load({"in_features": 3}, Net())
    with pytest.raises(TypeError, match=r"of type Counter from \{'_target_'"):
        load({"_target_": "collections.Counter"}, Net())


def test_a_list_is_an_ensemble(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, Sized(40), fit=False)
    net = Other(CLASSES)
    teacher = load([net, path, {"_target_": "torch.nn.Identity"}], Sized(8))
    assert [type(member) for member in teacher.modules] == [Other, Sized, nn.Identity]
    assert type(load(nn.Sequential(nn.Linear(2, 2)), net).modules[0]) is nn.Sequential


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ([], ValueError, "got an empty list"),
        ("emma", ValueError, "'ema' or 'ema:0.999'.*there is no file 'emma'"),
        (Path("gone.ckpt"), ValueError, "there is no file 'gone.ckpt'"),
        (["ema"], ValueError, "no member of an ensemble"),
        ("ema:2", ValueError, r"`teacher='ema:…'` must be a number in \[0, 1\]"),
        ("ema:slow", ValueError, r"must be a number in \[0, 1\], got 'slow'"),
        (3, TypeError, "got 3 of type int"),
        (nn.Linear, TypeError, "of type type"),
        (None, TypeError, "got None"),
    ],
)
def test_what_means_no_teacher_is_refused(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        load(value, Net())


def test_a_teacher_that_shares_parameters_with_the_student_is_refused() -> None:
    student = Net()
    with pytest.raises(ValueError, match=r"its 'net.0.weight' is the student's 'net.0.weight'.*copy.deepcopy"):
        load(student, student)
    with pytest.raises(ValueError, match=r"its '2.weight' is the student's 'net.4.weight'"):
        load([Net(), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), student.net[4])], student)
    same_storage = nn.Linear(16, 16)
    same_storage.weight.data = student.net[2].weight.data
    with pytest.raises(ValueError, match=r"its 'weight' is the student's 'net.2.weight'"):
        load(torch.compile(same_storage), student)
    assert load(copy.deepcopy(student), student).modules
    assert load(nn.LazyLinear(3), nn.LazyLinear(3)).modules


# --- the student's moving average -------------------------------------------------------------------------------------


def step(module: nn.Module, seed: int) -> None:
    """Change a module as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    module.train()(torch.randn(8, FEATURES, generator=generator).to(next(module.parameters()).dtype))


@pytest.mark.parametrize("make", [Noisy, TiedNet])
def test_the_average_is_that_of_torch(make: Any, x: Tensor) -> None:
    student = seeded(make)
    teacher = load("ema:0.9", student)
    reference = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(student)  # the first copies
    assert same(teacher((x,), {}), [copy.deepcopy(student).eval()(x).detach()])
    for seed in range(5):
        step(student, seed)
        teacher.update(student)
        reference.update_parameters(student)
    expected = dict(reference.module.named_parameters())
    state = teacher.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value)
    for name, value in student.named_buffers():
        assert torch.equal(state[name], value)
    assert set(state) == {*expected, *dict(student.named_buffers())}
    assert not any(parameter.requires_grad for parameter in teacher.modules[0].parameters())


def test_by_the_formula_in_float64() -> None:
    student = nn.Linear(3, 2).double()
    teacher = EMATeacher(student, 0.99)
    average = student.weight.detach().clone()
    assert teacher.state_dict() == {}
    assert teacher.modules
    for _ in range(20):
        nn.init.normal_(student.weight)
        teacher.update(student)
        average = 0.99 * average + (1 - 0.99) * student.weight.detach()
    torch.testing.assert_close(teacher.state_dict()["weight"], average, rtol=1e-13, atol=0)


def test_16_bit_weights_are_averaged_in_float32(x: Tensor) -> None:
    student = seeded(Net).bfloat16()
    teacher = EMATeacher(student, 0.999)
    assert teacher.modules
    before = student.net[0].weight.detach().float()
    with torch.no_grad():
        student.net[0].weight.mul_(1.25)
    for _ in range(3):
        teacher.update(student)
    gone = (teacher.state_dict()["net.0.weight"] - before) / before
    torch.testing.assert_close(gone, torch.full_like(gone, 0.25 * (1 - 0.999**3)), rtol=0.02, atol=0)
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float32}
    assert teacher((x.bfloat16(),), {})[0].dtype == torch.float32


@pytest.mark.parametrize("is_used_before", [True, False])
def test_a_resumed_average_goes_on_bit_identically(x: Tensor, is_used_before: bool) -> None:
    def run(student: nn.Module, teacher: EMATeacher, seeds: range) -> Tensor:
        for seed in seeds:
            step(student, seed)
            teacher.update(student)
        return teacher((x,), {})[0]

    student = seeded(Noisy)
    whole = EMATeacher(student)
    whole((x,), {})
    run(student, whole, range(3))
    saved = copy.deepcopy((student.state_dict(), whole.state_dict()))
    expected = run(student, whole, range(3, 6))

    other = seeded(Noisy, 1)
    resumed = EMATeacher(other)
    if is_used_before:
        resumed((x,), {})
    other.load_state_dict(saved[0])
    resumed.load_state_dict(pickle.loads(pickle.dumps(saved[1])))
    assert same(resumed.state_dict(), saved[1])
    assert torch.equal(run(other, resumed, range(3, 6)), expected)
    assert same(resumed.state_dict(), whole.state_dict())


def test_an_average_of_another_student_is_refused(x: Tensor) -> None:
    state = EMATeacher(Net(16))
    assert state.modules
    teacher = EMATeacher(Net(8))
    teacher.load_state_dict(state.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'net.0.bias' is \(16,\) there and \(8,\) here"):
            teacher((x,), {})
    teacher = EMATeacher(Noisy())
    assert teacher.modules
    with pytest.raises(ValueError, match=r"'first.bias' is missing there and \(8,\) here"):
        teacher.load_state_dict(state.state_dict())


def test_an_update_with_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds 'net.0.weight', and Noisy has no such tensor"):
        EMATeacher(Net()).update(Noisy())


def test_parameters_may_be_replaced_between_updates() -> None:
    student = seeded(Net).net
    teacher, average = EMATeacher(student, 0.5), student[0].weight.detach().clone()
    assert teacher.modules
    for seed in range(3):
        student[0].weight = nn.Parameter(student[0].weight.detach().clone())
        step(student, seed)
        teacher.update(student)
        average = 0.5 * average + 0.5 * student[0].weight.detach()
    torch.testing.assert_close(teacher.state_dict()["0.weight"], average)


def test_without_an_average_in_the_checkpoint_it_begins_anew(x: Tensor) -> None:
    student = seeded(Noisy)
    teacher = EMATeacher(student)
    teacher((x,), {})
    step(student, 0)
    teacher.load_state_dict({})
    assert same(teacher((x,), {}), [copy.deepcopy(student).eval()(x).detach()])


def test_it_follows_a_module_that_is_found_late(x: Tensor) -> None:
    student = seeded(Net)
    teacher = load("ema", student)
    teacher.attach("cpu")
    teacher.follow(student.net)
    assert same(teacher((x,), {}), [student(x).detach()])
    step(student.net, 0)
    teacher.follow(student.net)
    teacher.update(student.net)
    assert list(teacher.state_dict()) == list(student.net.state_dict())
    teacher.detach()


def test_it_averages_a_compiled_student(x: Tensor) -> None:
    student = seeded(Net).net
    teacher, plain = EMATeacher(torch.compile(student, backend="eager")), EMATeacher(student)
    for each, module in ((teacher, torch.compile(student, backend="eager")), (plain, student)):
        each((x,), {})
        with torch.no_grad():
            student[0].weight.fill_(0.5)
        each.update(module)
    assert list(teacher.state_dict()) == list(plain.state_dict())
    torch.compiler.reset()


@pytest.mark.parametrize("range", ["learned", "moving_average"])
def test_the_average_of_a_quantized_student_is_float(x: Tensor, range: Any) -> None:
    student = seeded(Net).net
    plain = copy.deepcopy(student)
    insertion = insert(student, Settings(range=range, weight_bits=2, activation_bits=2))
    insertion.switch(True)
    insertion.observe(True)
    insertion.start_pass()
    student.train()(x)
    teacher = EMATeacher(student)
    assert same(teacher((x,), {}), [plain(x).detach()])
    assert any(quantizer.is_on for quantizer in insertion.quantizers.values())
    assert not torch.equal(student.eval()(x), plain(x))
    with torch.no_grad():
        student[0].weight.add_(1.0)
        plain[0].weight.lerp_(plain[0].weight + 1.0, 1 - 0.999)
    teacher.update(student)
    assert set(teacher.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(teacher((x,), {})[0], plain(x).detach())


def test_another_signature_is_named_with_the_way_out() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return x * scale

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + "1"

    with pytest.raises(TypeError, match=r"Scaled, takes \(x.*, scale.*1 positional argument.*`teacher_input`"):
        Teacher([Scaled()])((torch.zeros(1),), {})
    with pytest.raises(TypeError, match="unsupported operand"):  # what goes wrong within is not explained away
        Teacher([Fails()])((torch.zeros(1),), {})
