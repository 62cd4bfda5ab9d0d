"""The teacher: a module, or several, that answer beside a student that trains, and leave no trace in it.

It is a guest: neither it nor who holds it is a module, so that it is in no ``state_dict``, checkpoint, optimizer or DDP
bucket.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.copying import standalone_copy
from lightning_compress.distillation.capture import first_tensor, unchanged
from lightning_compress.example_inputs import reset_compiled
from lightning_compress.modules import clean_name, named_module
from lightning_compress.moments import number

_ALLOWED = (
    "a module, the path of a Lightning checkpoint, a dict with `_target_`, 'ema' or 'ema:0.999', or a list of modules, "
    "paths and dicts"
)


class Teacher:
    """Answers what the student is asked, in eval mode and without gradients, on the device of the inputs.

    Each member computes in its own precision: floating-point inputs are cast to it, and answers in 16 bits come back
    as float32. The surrounding autocast holds for members in float32 only. The global random state stays as it is,
    provided that members that draw random numbers in eval mode do so in their first answer.

    Args:
        modules: The members; several are an ensemble.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Dropout(0.5))
        >>> _ = nn.init.constant_(net[0].weight, 3.0)
        >>> teacher = Teacher([net])
        >>> teacher((torch.tensor([[1.0, 2.0]]),), {})
        [tensor([[9.]])]
        >>> net.training
        False
        >>> teacher.detach()
        >>> net.training
        True
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._members = list(modules)
        self._flags: list[tuple[nn.Module, bool]] = []  # each submodule, and whether it was in training mode
        self._draws: bool | None = None  # whether they draw random numbers, which the first answer shows
        self._first: list[_First | None] = []  # of each member, where it is sure to stay
        self._handles: list[Any] = []
        self._watched: list[str] = []
        self._features: dict[str, tuple[Tensor, int]] = {}  # with the version of the tensor

    def __str__(self) -> str:
        return " and ".join(type(module).__name__ for module in self._members)

    @property
    def modules(self) -> list[nn.Module]:
        """The members."""
        return self._members

    def attach(self, device: torch.device | str | None = None) -> None:
        """Set the members to eval mode, remember in which mode each part was, and move them.

        Args:
            device: Where to; ``None`` leaves them where they are.
        """
        if not self._flags:
            self._flags = [(part, part.training) for module in self.modules for part in module.modules()]
        for module in self.modules:
            module.eval()
            if device is not None:
                module.to(device)
        self._first = [_lasting_first_tensors(module) for module in self.modules]

    def detach(self) -> None:
        """Take the hooks away and put each part back into the mode that it was in; parameters stay where they are."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            reset_compiled(*self.modules)
        for part, training in self._flags:
            part.training = training
        self._handles, self._watched, self._features, self._flags = [], [], {}, []

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return what each member answers.

        Args:
            args: The positional arguments of the members' forward.
            kwargs: Those by keyword.
        """
        self._features = {}
        if args and isinstance(args[0], Tensor):  # as most are, and a tree costs as much as a small loss
            device: torch.device | None = args[0].device
        else:
            device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        modules = self.modules
        if not self._flags or any(part.training for part, _ in self._flags):  # somebody has called `train()`
            self.attach()
        # Tensors made in inference mode cannot be saved for a backward pass, so no loss could use them.
        with torch.no_grad(), nullcontext() if self._draws is False else self._unchanged_random_state(device):
            return [_answer(*member, args, kwargs, device) for member in zip(modules, self._first, strict=True)]

    @contextmanager
    def _unchanged_random_state(self, device: torch.device | None) -> Iterator[None]:
        """Put the random state back, and find out whether there is a need to: it costs as much as a small loss."""
        cuda = [device] if device is not None and device.type == "cuda" else []

        def states() -> list[Tensor]:
            return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]

        with torch.random.fork_rng(cuda):
            before = states()
            yield
            self._draws = self._draws or not all(map(torch.equal, before, states()))

    def watch(self, names: Sequence[str]) -> None:
        """Keep what layers return at each call, for :meth:`features`.

        Args:
            names: The qualified names of the teacher's layers.

        Raises:
            ValueError: For a name that does not exist, with the closest ones, or with an ensemble.
        """
        if len(self.modules) > 1:
            raise ValueError(
                f"`features` are those of one teacher, and `teacher` is an ensemble of {len(self.modules)}: leave "
                f"`features` out, or give one teacher."
            )
        layers = {name: named_module(self.modules[0], name, "features") for name in names}
        reset_compiled(*self.modules)
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._keep, name)))
        self._watched += layers

    def features(self) -> dict[str, Tensor]:
        """Return what the watched layers returned at the last call, the first tensor where it was several.

        Raises:
            ValueError: If a layer was not called, or if a later one has changed its output in place, by name.
        """
        for name in self._watched:
            if name not in self._features:
                raise ValueError(f"`features` names '{name}', which the teacher's forward never calls.")
        return {name: _single(unchanged(*kept, name, "teacher")) for name, kept in self._features.items()}

    @torch.compiler.disable
    def _keep(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output, name)
        self._features[name] = (tensor, tensor._version)

    def __deepcopy__(self, memo: Any) -> Teacher:
        """Return itself: who copies a student, as weight averaging does, does not mean its teacher."""
        return self


class EMATeacher(Teacher):
    """The student's own moving average: p ← decay · p + (1 − decay) · student, after each optimizer step.

    It begins as a copy, made at the first use, and there is no warm-up of the decay. What rounds in the student is
    switched off in the copy, and 16-bit weights are averaged in float32. Buffers, as those of batch norm, are the
    student's latest. Mean teacher, Tarvainen and Valpola 2017 (arXiv:1703.01780).

    Args:
        student_module: The module that is averaged.
        decay: In [0, 1], for each optimizer step.

    Example::

        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(student.weight, 1.0)
        >>> teacher = EMATeacher(student, decay=0.9)
        >>> _ = teacher((torch.ones(1, 1),), {}), nn.init.constant_(student.weight, 2.0)
        >>> teacher.update(student)
        >>> round(teacher.state_dict()["weight"].item(), 4)
        1.1

    Raises:
        ValueError: If `decay` lies outside.
    """

    def __init__(self, student_module: nn.Module, decay: float = 0.999) -> None:
        super().__init__([])
        self.decay = number(decay, "decay", 0.0, 1.0)
        self._student = student_module
        self._restored: dict[str, Tensor] = {}
        self._matched: nn.Module | None = None  # the student that the pairs are of
        self._pairs: list[tuple[nn.Module, nn.Module, str]] = []

    def __str__(self) -> str:
        return f"the student's moving average (decay {self.decay:g})"

    @property
    def modules(self) -> list[nn.Module]:
        """The average alone, which is made here if there is none yet."""
        if not self._members:
            copied = standalone_copy(self._student).requires_grad_(False)
            for part in copied.modules():
                if _is_switch(part):
                    part.is_on = False  # type: ignore[assignment]
            copied._apply(_single)
            if self._restored:
                _write(copied, self._restored)
            self._members = [copied]
        return self._members

    def attach(self, device: torch.device | str | None = None) -> None:
        """Move the average, if there is one; else it will be made where the student is."""
        if self._members:
            super().attach(device)

    def detach(self) -> None:
        """Take the hooks away."""
        if self._members:
            super().detach()

    def follow(self, student_module: nn.Module) -> None:
        """Say which module is averaged, where that is found out late. Once there is an average, it stays."""
        self._student = student_module

    @torch.no_grad()
    def update(self, student_module: nn.Module) -> None:
        """Move the average towards the student, right after an optimizer step.

        Raises:
            ValueError: If it is not the module that was averaged so far, by name.
        """
        (average,) = self.modules
        if self._matched is not student_module:
            self._pairs, self._matched = _pairs(average, student_module), student_module
        averages: list[Tensor] = []
        latest: list[Tensor] = []
        for mine, other, attribute in self._pairs:
            tensor, new = getattr(mine, attribute), getattr(other, attribute)
            if isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()):
                averages.append(tensor)
                latest.append(new.to(tensor.dtype))
            else:
                tensor.copy_(new)
        torch._foreach_lerp_(averages, latest, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average's parameters and buffers by name, copied to the CPU; nothing while there is none."""
        if not self._members:
            return dict(self._restored)
        return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(self._members[0]).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take an average back; before the first use it is taken then.

        Raises:
            ValueError: If it is that of another module, by name.
        """
        self._restored = dict(state)
        if state and self._members:
            _write(self._members[0], state)
        elif not state:
            self._members, self._flags, self._matched = [], [], None


def load(teacher: Any, student: nn.Module, *, cls: type | None = None) -> Teacher:
    """Return the teacher that a value means.

    Args:
        teacher: A module; the path of a Lightning checkpoint, which is loaded as the class of the student with the
            hyperparameters that the checkpoint keeps; a dict with ``_target_``, which Hydra instantiates; ``"ema"`` or
            ``"ema:0.99"``, the student's own moving average; or a list of all but the last, an ensemble.
        student: The student, which shares no parameter with it.
        cls: The class that a checkpoint is loaded as, by default the student's.

    Example::

        >>> load("ema:0.99", nn.Linear(4, 2)).decay
        0.99

    Raises:
        ValueError: If a checkpoint cannot be loaded, a list is empty, or parameters are shared with the student.
        TypeError: If it is, or makes, something that is no module.
    """
    if _is_ema(teacher):
        _, _, decay = teacher.partition(":")
        return EMATeacher(student, number(decay, "teacher='ema:…'", 0.0, 1.0)) if decay else EMATeacher(student)
    is_list = isinstance(teacher, Sequence) and not isinstance(teacher, (str, nn.Module))
    if is_list and not len(teacher):
        raise ValueError(f"`teacher` must be {_ALLOWED}, got an empty list.")
    with torch.random.fork_rng([]):  # whose weights are read or made now is no concern of the student's training
        modules = [_load_one(member, cls or type(student)) for member in (teacher if is_list else [teacher])]
    for module in modules:
        _refuse_shared(module, student)
    return Teacher(modules)


def merge(outputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of an ensemble's logits: their softmax is the normalized geometric mean of the distributions.

    Args:
        outputs: One tensor for each member, all of one shape.

    Example::

        >>> merge([torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0])])
        tensor([1., 2.])

    Raises:
        ValueError: If shapes differ.
    """
    if len(outputs) == 1:
        return _single(outputs[0])
    for index, output in enumerate(outputs):
        if output.shape != outputs[0].shape:
            raise ValueError(
                f"the members of `teacher` must give outputs of one shape, got {tuple(outputs[0].shape)} from member 0 "
                f"and {tuple(output.shape)} from member {index}: leave one of them out."
            )
    return torch.stack([_single(output) for output in outputs]).mean(0)


# What a value means ---------------------------------------------------------------------------------------------------


def _is_ema(teacher: Any) -> bool:
    return isinstance(teacher, str) and teacher.partition(":")[0] == "ema"


def _load_one(teacher: Any, cls: type) -> nn.Module:
    if _is_ema(teacher):
        raise ValueError(f"`teacher={teacher!r}` is no member of an ensemble: give it alone, or leave it out.")
    if isinstance(teacher, (str, Path)):
        return _from_checkpoint(teacher, cls)
    made = teacher
    if isinstance(teacher, Mapping):
        if "_target_" not in teacher:
            raise ValueError(f"`teacher` must be {_ALLOWED}, got a dict without `_target_`: {dict(teacher)!r}.")
        from hydra.utils import instantiate

        made = instantiate(teacher)
    if not isinstance(made, nn.Module):
        what = f"{made!r} of type {type(made).__name__}"
        raise TypeError(f"`teacher` must be {_ALLOWED}, got {what}{f' from {teacher}' if made is not teacher else ''}.")
    return made


def _from_checkpoint(path: str | Path, cls: type) -> nn.Module:
    is_url = isinstance(path, str) and "://" in path  # Lightning reads those too
    if not is_url and not Path(path).is_file():
        raise ValueError(f"`teacher` must be {_ALLOWED}, and there is no file '{path}'.")
    try:
        if not hasattr(cls, "load_from_checkpoint"):
            raise TypeError("it is no LightningModule")
        return cls.load_from_checkpoint(path, map_location="cpu")
    except Exception as error:
        # torch reads nothing but tensors and plain values from a file, unless it is told that the file is trusted.
        trust = ", 'weights_only': False" if isinstance(error, pickle.UnpicklingError) else ""
        raise ValueError(
            f"`teacher='{path}'` could not be loaded as {cls.__name__}, the student's class, with the hyperparameters "
            f"that the checkpoint keeps: {type(error).__name__}: {error}. Give the module itself, or say how it is made"
            f"{' if you trust the file' if trust else ''}: teacher={{'_target_': "
            f"'my_package.BigNet.load_from_checkpoint', 'checkpoint_path': '{path}'{trust}}}."
        ) from error


def _refuse_shared(module: nn.Module, student: nn.Module) -> None:
    def places(of: nn.Module) -> dict[int, str]:
        return {
            parameter.untyped_storage().data_ptr() or id(parameter): clean_name(name)
            for name, parameter in of.named_parameters()
            if not isinstance(parameter, nn.parameter.UninitializedParameter)
        }

    own = places(student)
    for place, name in places(module).items():
        if place in own:
            raise ValueError(
                f"`teacher` shares parameters with the student: its '{name}' is the student's '{own[place]}'. Give a "
                f"copy, copy.deepcopy(module), or teacher='ema' for the student's own moving average."
            )


# One member -----------------------------------------------------------------------------------------------------------


_First = tuple[Tensor | None, Tensor | None]  # a module's first tensor, and its first one of floating-point numbers


def _answer(
    module: nn.Module,
    first: _First | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device | None,
) -> Any:
    anywhere, floating = _first_tensors(module) if first is None else first
    if device is not None and anywhere is not None and anywhere.device != device:
        module.to(device)
    dtype = None
    if floating is not None:
        dtype = floating.dtype
        args = tuple([_cast(value, dtype) for value in args])
        kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
    try:
        kind = device.type if device is not None else "cpu"
        with nullcontext() if dtype in (None, torch.float32) else torch.autocast(kind, enabled=False):
            return _raised(module(*args, **kwargs))
    except TypeError as error:
        _explain(error, module, args, kwargs)
        raise


def _explain(error: TypeError, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise where it was the call itself that a module's forward does not take."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as reason:
        names = "".join(f", {name}=" for name in kwargs)
        raise TypeError(
            f"The teacher, {type(module).__name__}, takes {signature}, and the student's module was called with "
            f"{len(args)} positional argument{'s' * (len(args) != 1)}{names} ({reason}): let `teacher_input` make the "
            f"one from the other, or give `module` the name of a module of the student that takes the same."
        ) from error


def _first_tensors(module: nn.Module) -> _First:
    def tensors() -> Iterator[Tensor]:
        return chain(module.parameters(), module.buffers())

    return next(tensors(), None), next((tensor for tensor in tensors() if tensor.is_floating_point()), None)


def _lasting_first_tensors(module: nn.Module) -> _First | None:
    """The same, to be looked for once; ``None`` where ``module.to`` may put other objects in their place."""
    first = _first_tensors(module)
    return first if all(type(tensor) is nn.Parameter for tensor in first) else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with all floating-point tensors in it in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    return tree_map(lambda leaf: _cast(leaf, dtype) if isinstance(leaf, Tensor) else leaf, value)


def _raised(output: Any) -> Any:
    """Return an output with all tensors of 16 bits or less in it as float32."""
    if isinstance(output, Tensor):
        return _single(output)
    return tree_map(lambda leaf: _single(leaf) if isinstance(leaf, Tensor) else leaf, output)


def _single(tensor: Tensor) -> Tensor:
    """Return a tensor of 16 bits or less as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


# The student's tensors, without those of what rounds ------------------------------------------------------------------


def _is_switch(module: nn.Module) -> bool:
    return isinstance(getattr(module, "is_on", None), bool)


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return by name where parameters and buffers are held; tied ones once."""
    found = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        if not _is_switch(part):
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[clean_name(f"{path}.{name}" if path else name)] = (part, name)
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(part, attribute) for name, (part, attribute) in _places(module).items()}


def _pairs(average: nn.Module, student: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    own, others = _places(average), _places(student)
    for name in own:
        if name not in others:
            raise ValueError(
                f"The moving average holds '{name}', and {type(student).__name__} has no such tensor: give "
                f"`update` the module that was averaged so far."
            )
    return [(part, others[name][0], attribute) for name, (part, attribute) in own.items()]


@torch.no_grad()
def _write(average: nn.Module, state: Mapping[str, Tensor]) -> None:
    tensors = _tensors(average)
    for name in sorted(tensors.keys() | state.keys()):
        here, there = (tuple(of[name].shape) if name in of else "missing" for of in (tensors, state))
        if here != there:
            raise ValueError(
                f"The moving average in the checkpoint is that of another student: '{name}' is {there} there and "
                f"{here} here. Resume with the same student, or start anew with `teacher='ema'`."
            )
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
