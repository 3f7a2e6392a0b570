"""Running code without its numbers: shapes, live bytes and arithmetic are those of the real run, and nothing is slow.

torch's own `FakeTensorMode` takes ten times as long for each operation, its `MemTracker` does not take frozen weights,
and both stop where code asks for a number. What is counted here is compared with real runs in
`tests/planning/test_planning_measured.py`.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

KNOWN_NUMBERS = 2**18
"""Tensors of at most so many numbers have them. Masks, tokens and the choices of a sampler do; states and logits do
not."""
_META = torch.device("meta")


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of live storages, each once: ``live`` are there now, and ``peak`` is the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def count(self, value: object) -> None:
        """Counts the storage of a tensor, if it is one and was not counted."""
        if not isinstance(value, Tensor):
            return
        storage = (value.shape_only if isinstance(value, Ghost) else value).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


class Ghost(Tensor):
    """A tensor of the CPU without numbers. Its shape and storage are those of a tensor on the meta device."""

    shape_only: Tensor

    @staticmethod
    def __new__(cls, shape_only: Tensor) -> "Ghost":
        # It says that it is on the CPU, as tensors with numbers are: autocast then treats both alike, and autograd
        # takes the gradient of the one for the other.
        facts: Any = {"strides": shape_only.stride(), "storage_offset": shape_only.storage_offset()}
        ghost = Tensor._make_wrapper_subclass(
            cls, shape_only.shape, dtype=shape_only.dtype, device=torch.device("cpu"), **facts
        )
        ghost.shape_only = shape_only
        return ghost

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} met a tensor without numbers outside of the rehearsal that made it.")


class Rehearsal(TensorMemory):
    """Inside, operations on many numbers are not computed. All others are, so that code can ask for their results.

    A small result of unknown numbers is zeros: a token is 0, a log-prob is 0, no comparison holds. What depends on them
    therefore takes its longest way, such as a sampler that reveals more where it is sure.

    ``flops`` are those of products and attention, as `torch.utils.flop_counter` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def imagine(self, module: nn.Module) -> None:
        """Puts tensors of this rehearsal in the place of a module's on the meta device. Shared ones stay shared."""
        imagined: dict[int, Any] = {}
        # Held until the end, so that no two of them get one id.
        held = [*module.parameters(), *module.buffers()]
        with self:
            for tensor in held:
                blank = torch.zeros(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                imagined[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                table.update({k: imagined[id(v)] for k, v in table.items() if v is not None and v.is_meta})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._result(func, args, kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if func is torch.ops.aten._grouped_mm.default:  # of which that registry does not know
            self.flops += 2.0 * args[0].numel() * args[1].shape[-1]
        elif formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in result if isinstance(result, list | tuple) else (result,):
            self.count(leaf)
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in _leaves(args) + _leaves(tuple(kwargs.values())) if isinstance(leaf, Tensor)]
        is_known = not any(isinstance(tensor, Ghost) for tensor in given)
        # What is new is looked at before it is made. A view costs nothing, and must be one of the same storage.
        if is_known and given and (func.is_view or all(tensor.numel() <= KNOWN_NUMBERS for tensor in given)):
            return _known(func, args, kwargs)
        try:
            result = func(*_mapped(_shape, args), **({} if given else {"device": _META}) | _mapped(_shape, kwargs))
        # Kernels without shapes of their own, and questions such as `nonzero` and `item`, whose answer is in numbers.
        except (RuntimeError, NotImplementedError):
            return func(*_mapped(_zeros, args), **_mapped(_zeros, kwargs))
        if func._schema.is_mutable and result is not None:
            return kwargs["out"] if "out" in kwargs else args[0]
        if not given and all(leaf.numel() <= KNOWN_NUMBERS for leaf in tree_leaves(result)):
            return _known(func, args, kwargs)
        return tree_map_only(Tensor, Ghost if func.is_view else _settled, result)


def _known(func: Any, args: Any, kwargs: Any) -> Any:
    """The result with its numbers. What nobody has written yet is zeros, since whoever writes it may be left out."""
    result = func(*args, **kwargs)
    return result.zero_() if "empty" in func.__name__ else result


def drop_by_booleans(module: nn.Module) -> None:
    """Has dropout keep its mask as booleans, as it does on a GPU, and not in the type of what it drops."""
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.forward = partial(_dropped, part)  # type: ignore[method-assign]


def _dropped(part: nn.Dropout, x: Tensor) -> Tensor:
    return torch.native_dropout(x, part.p, True)[0] if part.training else x


def _leaves(values: Any) -> list[Any]:
    """Arguments of an operation, and what is in lists among them. `tree_leaves` takes longer than the operation."""
    return [leaf for value in values for leaf in (value if isinstance(value, list | tuple) else (value,))]


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(function, each) for name, each in value.items()}
    return [_mapped(function, each) for each in value] if isinstance(value, list | tuple) else function(value)


def _shape(value: Any) -> Any:
    if isinstance(value, Ghost):
        return value.shape_only
    if isinstance(value, Tensor) and value.ndim:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    return _META if isinstance(value, torch.device) else value


def _zeros(value: Any) -> Any:
    if not isinstance(value, Ghost):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


def _settled(shape_only: Tensor) -> Tensor:
    ghost = Ghost(shape_only)
    return _zeros(ghost) if ghost.numel() <= KNOWN_NUMBERS else ghost
