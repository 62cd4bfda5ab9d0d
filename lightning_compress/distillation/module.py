"""A LightningModule that wraps a student and its teacher."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from weakref import WeakValueDictionary

from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_compress.distillation.callback import KnowledgeDistillation
from lightning_compress.distillation.capture import Select
from lightning_compress.moments import ScheduledLike
from lightning_compress.training import callbacks


class DistillationModule(LightningModule):
    """Train a student with a teacher: ``trainer.fit(DistillationModule(student, teacher))``.

    It does what a Trainer with ``KnowledgeDistillation(teacher, …)`` does with the bare student, and shares all of the
    student's state: parameters under their own names, hyperparameters, ``training_step``, ``validation_step``, hooks,
    metrics, optimizers and logging are the student's. So ``Student.load_from_checkpoint`` opens its checkpoints, a
    run of it resumes, and the student is trained in place. It is an instance of the student's class, too.

    Args:
        student: Any LightningModule.
        teacher: See :class:`KnowledgeDistillation`, as for all other arguments.
        losses: What is minimized between the student's logits and the teacher's.
        temperature: What logits are divided by.
        weight: The share of distillation in the loss.
        module: The name of the student's module whose output is distilled.
        output: What takes the logits out of an output that is no tensor.
        teacher_input: What turns the student's inputs into the teacher's.
        features: Which layers learn from which.
        initialize: Whether the student starts from the teacher's weights.
        cache: Where the teacher's outputs are kept.

    Raises:
        TypeError: If the student is no LightningModule.
        ValueError: As for :class:`KnowledgeDistillation`; or if the student has an attribute ``student``,
            ``student_type`` or ``distillation`` of its own.

    Example::

        >>> class Student(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(4, 2)
        >>> student = Student()
        >>> module = DistillationModule(student, teacher=nn.Linear(4, 2))
        >>> list(module.state_dict()), isinstance(module, Student), type(module.student) is Student
        (['net.weight', 'net.bias'], True, True)
    """

    student_type: ClassVar[type[LightningModule] | None] = None

    def __init__(
        self,
        student: LightningModule,
        teacher: Any,
        losses: Any = "kl",
        temperature: ScheduledLike = 4.0,
        weight: ScheduledLike = 0.9,
        module: str | None = None,
        output: Select | None = None,
        teacher_input: Callable[..., Any] | None = None,
        features: dict[str, Any] | None = None,
        initialize: str | dict[str, str] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        if isinstance(getattr(student, "_orig_mod", None), nn.Module):
            raise TypeError("`student` is compiled: give the plain one, and compile the DistillationModule instead.")
        if not isinstance(student, LightningModule):
            raise TypeError(f"`student` must be a LightningModule, got {type(student).__name__}.")
        if isinstance(student, DistillationModule):
            raise TypeError("`student` is a DistillationModule already: give it a list of teachers.")
        for name in ("student", "student_type", "distillation"):
            if hasattr(student, name):
                raise ValueError(
                    f"`student` has an attribute '{name}', as the DistillationModule does: rename it, or give the "
                    f"Trainer a KnowledgeDistillation callback instead."
                )
        distillation = KnowledgeDistillation(
            teacher, losses, temperature, weight, module, output, teacher_input, features, initialize, cache
        )
        distillation.act_only_on_its_own()
        # The student has been initialized: its attributes become this object's, so that there is one state and not two.
        object.__setattr__(self, "__class__", _class_for(type(self), type(student)))
        object.__setattr__(self, "__dict__", vars(student))
        vars(self)["_aside"] = _Aside(distillation)
        _keep_own_hyperparameters(student)

    @property
    def student(self) -> LightningModule:
        """The student: an object of its own class, with the same parameters and all else."""
        assert self.student_type is not None
        student = object.__new__(self.student_type)
        object.__setattr__(student, "__dict__", vars(self))
        return student

    @property
    def distillation(self) -> KnowledgeDistillation:
        """The callback that does the work."""
        aside: _Aside = vars(self)["_aside"]
        return aside.distillation

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Return the student's own callbacks, and the one that distils.

        Raises:
            ValueError: If the Trainer has a :class:`KnowledgeDistillation` as well.
        """
        own = super().configure_callbacks()
        for other in callbacks(self.trainer):
            if isinstance(other, KnowledgeDistillation) and other.acts_on(self) and other is not self.distillation:
                raise ValueError(
                    "The model is a DistillationModule, and the Trainer has a KnowledgeDistillation callback: leave "
                    "one of them out, and give the other a list of teachers."
                )
        return [*([own] if isinstance(own, Callback) else own), self.distillation]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and other processes make the class anew, which has no name to find it by."""
        return _rebuild, (type(self).__bases__[0], self.student_type), self.__getstate__()

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Say how its checkpoints are opened: they are the student's."""
        raise ValueError(
            "The checkpoint of a DistillationModule is the student's own: load it by `Student.load_from_checkpoint`, "
            "with your student's class, or give it to `trainer.fit(module, ckpt_path=...)`."
        )


def _keep_own_hyperparameters(student: LightningModule) -> None:
    """Take those of the DistillationModule away that LightningCLI has given to the student within."""
    given = student.hparams.get("student")
    if "_class_path" in student.hparams and isinstance(given, Mapping):
        own = {"_class_path": given["class_path"], "_instantiator": student.hparams["_instantiator"]}
        student.hparams.clear()
        student.save_hyperparameters(own | given.get("init_args", {}))


class _Aside:
    """Keeps the callback and its teacher out of the module's tree, and lets copies of the module share them."""

    def __init__(self, distillation: KnowledgeDistillation) -> None:
        self.distillation = distillation

    def __deepcopy__(self, memo: Any) -> _Aside:
        return self


_classes: WeakValueDictionary[tuple[type, type], type[DistillationModule]] = WeakValueDictionary()


def _class_for(base: type[DistillationModule], student_type: type[LightningModule]) -> type[DistillationModule]:
    """Return a class derived from both; the same one each time."""
    if (base, student_type) in _classes:
        return _classes[base, student_type]

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(student_type=student_type, __doc__=base.__doc__, __module__=base.__module__)

    name = f"Distilled{student_type.__name__}"
    made: type[DistillationModule] = types.new_class(name, (base, student_type), {}, fill)
    return _classes.setdefault((base, student_type), made)


def _rebuild(base: type[DistillationModule], student_type: type[LightningModule]) -> DistillationModule:
    return object.__new__(_class_for(base, student_type))
