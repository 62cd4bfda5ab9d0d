"""The norms of layers' inputs, gathered by hooks while they are on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.modules import Target


def input_norm(squares: Tensor, target: Target, shape: Sequence[int] | None = None) -> Tensor:
    """Return ‖x‖ of each input, from the sums of squares, in a shape that broadcasts with a layer's weight.

    Args:
        squares: The sums.
        target: The weight.
        shape: Its shape, where the module does not show it because each process holds a piece.

    Example::

        >>> layer = nn.Linear(2, 1)
        >>> input_norm(torch.tensor([25.0, 1.0]), Target("weight", "", layer, "weight")).tolist()
        [[5.0, 1.0]]
    """
    module, shape = target.module, tuple(target.parameter.shape if shape is None else shape)
    norms, places = squares.sqrt(), (1,) * (len(shape) - 2)
    if norms.dim() == 2:  # the inputs of q, k and v, one below the other
        return norms.repeat_interleave(shape[0] // 3, 0)
    if isinstance(module, tuple(_TRANSPOSED)):  # (in, out / groups, …)
        return norms.reshape(-1, 1, *places)
    groups = getattr(module, "groups", 1)  # (out, in / groups, …)
    each = norms.reshape(groups, 1, -1).expand(groups, shape[0] // groups, -1)
    return each.reshape(shape[0], -1, *places) if groups > 1 else norms.reshape(1, -1, *places)


_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[nn.Module], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_SPATIAL = {**_CONVOLUTIONS, **_TRANSPOSED}


class InputNorms:
    """Sums the squares of what layers receive, for the criteria whose signal is ``"activation"``.

    Args:
        targets: The weights, by a number of the caller's.
        is_active: Asked at each forward pass: whether this one counts (a training batch, and not validation).

    Raises:
        ValueError: For a weight of which the inputs cannot be seen (recurrent layers, embeddings), by name.

    Example::

        >>> layer = nn.Linear(2, 1)
        >>> norms = InputNorms({0: Target("weight", "", layer, "weight")}, lambda: True)
        >>> norms.attach()
        >>> _ = layer(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> norms.detach()
        >>> norms.take()[0].tolist()
        [25.0, 1.0]
    """

    def __init__(self, targets: Mapping[int, Target], is_active: Callable[[], bool]) -> None:
        self._targets, self._is_active = dict(targets), is_active
        self._handles: list[RemovableHandle] = []
        self._squares: dict[int, Tensor] = {}
        self._inside: dict[int, _SeeAttention] = {}
        self._attention: dict[int, nn.MultiheadAttention] = {}
        for target in self._targets.values():
            if not isinstance(target.module, (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS, *_TRANSPOSED)):
                raise ValueError(
                    f"The criterion needs the inputs of '{target.name}', which cannot be seen in a "
                    f"{type(target.module).__name__}. Add '{target.module_name}' to `exclude`, "
                    f"or take another criterion."
                )
            if isinstance(target.module, nn.MultiheadAttention):
                self._attention[id(target.module.out_proj)] = target.module

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on."""
        if self._handles:
            return
        by_module: dict[int, tuple[nn.Module, list[int]]] = {}
        for i, target in self._targets.items():
            # The projections of nn.MultiheadAttention are used without being called: it is the attention that is seen.
            module = self._attention.get(id(target.module), target.module)
            by_module.setdefault(id(module), (module, []))[1].append(i)
        for module, members in by_module.values():
            see = (
                self._see_attention(module, members)
                if isinstance(module, nn.MultiheadAttention)
                else self._see(members)
            )
            self._handles.append(module.register_forward_pre_hook(torch.compiler.disable(see), with_kwargs=True))
            if isinstance(module, nn.MultiheadAttention):
                leave = torch.compiler.disable(self._leave)
                self._handles.append(module.register_forward_hook(leave, always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[int, Tensor]:
        """Return what was summed since the last call, by the caller's numbers, and begin anew."""
        squares, self._squares = self._squares, {}
        return squares

    def _see(self, members: list[int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._counts():
                x = args[0] if args else kwargs["input"]
                squares = _squares(x, -1 - next((n for kind, n in _SPATIAL.items() if isinstance(module, kind)), 0))
                for i in members:
                    self._add(i, squares)

        return hook

    def _see_attention(self, attention: nn.MultiheadAttention, members: list[int]) -> Callable[..., None]:
        inner = [i for i in members if self._targets[i].module is attention.out_proj]
        places = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._counts():
                return
            inputs = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
            squares = [_squares(x, -1) for x in inputs]
            for i in members:
                attribute = self._targets[i].attribute
                if attribute == "in_proj_weight":
                    self._add(i, torch.stack(squares))
                elif attribute in places:
                    self._add(i, squares[places[attribute]])
            if inner:
                mode = _SeeAttention(lambda x: self._add(inner[0], _squares(x, -1)))
                mode.__enter__()
                self._inside[id(module)] = mode

        return hook

    def _leave(self, module: nn.Module, *_: Any) -> None:
        mode = self._inside.pop(id(module), None)
        if mode is not None:
            mode.__exit__(None, None, None)

    def _counts(self) -> bool:
        # Activation checkpointing runs the forward pass again within backward: that is the same batch.
        return self._is_active() and torch._C._current_graph_task_id() == -1

    def _add(self, number: int, squares: Tensor) -> None:
        previous = self._squares.get(number)
        self._squares[number] = squares if previous is None else previous + squares


class _SeeAttention(TorchFunctionMode):
    """Sees what the output projection of an attention receives.

    The projection is applied inside one function, so that function is called once more with the identity in its place,
    on the same random numbers.
    """

    def __init__(self, see: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            call = _ATTENTION.bind(*args, **kwargs)
            query, weight = call.arguments["query"], call.arguments["out_proj_weight"]
            call.arguments["out_proj_weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            call.arguments["out_proj_bias"] = None
            devices = [query.device] if query.is_cuda else []
            with torch.no_grad(), torch.random.fork_rng(devices):
                self._see(func(*call.args, **call.kwargs)[0])
        return func(*args, **kwargs)


_ATTENTION = inspect.signature(nn.functional.multi_head_attention_forward)


@torch.no_grad()
def _squares(x: Tensor, dim: int) -> Tensor:
    """Sum the squares over all dimensions but one; what is not finite does not count."""
    x = x.detach().float()
    others = [d for d in range(x.dim()) if d != dim % x.dim()]
    return x.square().sum(others).nan_to_num(0.0, 0.0, 0.0)
