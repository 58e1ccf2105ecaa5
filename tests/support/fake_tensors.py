"""Fake tensors whose small values are known: real trainers run at a large model's shapes without its memory.

torch's FakeTensorMode gives each tensor a shape, dtype and device, but no numbers, so code that reads a length or a mask
stops there. `KnownValues` keeps the numbers of small tensors that depend on no weight (token ids, masks, lengths,
positions) and computes with them beside the fake ones. A number that depends on weights (a loss, a score, a sampled
token) is 0 where it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker, _MemRefType
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CONTIGUOUS = torch.contiguous_format
LARGEST = 2**20
"""Number of elements up to which a tensor's values are kept."""


class Known:
    """The values of a fake tensor, on the CPU."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __deepcopy__(self, memo: Any) -> Known:
        with _disable_current_modes():
            return Known(self.values.clone())


class KnownValues(TorchDispatchMode):
    """Mode above FakeTensorMode that knows the values of small tensors; `made_up` counts the numbers that are 0 because they depend on weights."""

    def __init__(self) -> None:
        super().__init__()
        self.made_up = 0
        # storages of known values to which an unknown value was written, kept so that no other gets their address
        self._stale: dict[int, torch.UntypedStorage] = {}

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's values on the CPU; None if they depend on weights."""
        known = vars(tensor).get("known")
        found = tensor if not isinstance(tensor, FakeTensor) else None if known is None else known.values
        return None if found is None or found.untyped_storage()._cdata in self._stale else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], self._places(args[0], args[1]), *args[2:])
        if func is aten.masked_select.default:
            return args[0][args[1]]
        if func is aten.nonzero.default:
            with _disable_current_modes():
                places = self._mask(args[0]).nonzero()
            return self._fake(places, args[0].device)
        if func is aten.equal.default:
            return True
        if func is aten._pin_memory.default:
            return args[0]
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        return out

    def _number(self, tensor: torch.Tensor) -> Any:
        known = self.value(tensor)
        if known is not None:
            with _disable_current_modes():
                return known.item()
        self.made_up += 1
        with _disable_current_modes():
            return torch.zeros((), dtype=tensor.dtype).item()

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask's values; if they are unknown, True everywhere."""
        known = self.value(mask)
        return torch.ones(mask.shape, dtype=torch.bool, device="cpu") if known is None else known

    def _places(self, tensor: torch.Tensor, indices: Any) -> list[torch.Tensor | None]:
        """Indices in which masks are replaced by the places where they are True."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                with _disable_current_modes():
                    places = self._mask(index).nonzero(as_tuple=True)
                found += [self._fake(place, index.device) for place in places]
            else:
                found.append(index)
        return found

    def _fake(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A fake tensor of known values."""
        made = torch.empty(values.shape, dtype=values.dtype, device=device)
        vars(made)["known"] = Known(values)
        return made

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Compute the values of `out` if those of all arguments are known."""
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for tensor in made:
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # FakeTensorMode's own value of a number, which a deep copy stumbles over
        if not made or any(tensor.numel() > LARGEST for tensor in made):
            return
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        joined = func in (aten.stack.default, aten.cat.default)  # numbers of a log, which are read together
        known = [self.value(tensor) is not None for tensor in given]
        if (decided := self._decided(func, given)) is not None:
            vars(made[0])["known"] = Known(decided)
            return
        if not all(known) and not (joined and any(known)):
            changed = [args[i] for i, a in enumerate(func._schema.arguments) if a.is_write and i < len(args)]
            self._stale |= {
                one.untyped_storage()._cdata: one.untyped_storage()
                for tensor in tree_leaves(changed)
                if isinstance(tensor, torch.Tensor) and (one := self.value(tensor)) is not None
            }
            return
        with _disable_current_modes():
            real_args, real_kwargs = tree_map(self._real, (args, kwargs))
            values = func(*real_args, **real_kwargs)
        for tensor, known in zip(made, [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)], strict=True):
            if isinstance(tensor, FakeTensor):
                vars(tensor)["known"] = Known(known)

    def _decided(self, func: Any, given: list[torch.Tensor]) -> torch.Tensor | None:
        """The value of `or` with a tensor that is True everywhere, and of `and` with one that is False everywhere."""
        decides = {aten.bitwise_or: True, aten.logical_or: True, aten.bitwise_and: False, aten.logical_and: False}
        side = decides.get(func.overloadpacket)
        for tensor in given if side is not None and len(given) == 2 else ():
            known = self.value(tensor)
            with _disable_current_modes():
                if known is not None and bool((known.bool() == side).all()) and tensor.shape == given[0].shape:
                    return torch.full(given[0].shape, int(side), dtype=given[0].dtype)
        return None

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            known = self.value(leaf)
            return torch.zeros(leaf.shape, dtype=leaf.dtype) if known is None else known
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


class WithoutCUDA(TorchFunctionMode):
    """Methods of CUDA tensors that a torch without CUDA refuses, by the operations that they consist of."""

    METHODS: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.Tensor.copy_: aten.copy_.default,
        torch.Tensor.nonzero: aten.nonzero.default,
        torch.Tensor.contiguous: lambda one, **_: one if one.is_contiguous() else one.clone(memory_format=CONTIGUOUS),
        torch.Tensor.new_tensor: lambda one, data, dtype=None, device=None: torch.tensor(
            data, dtype=dtype or one.dtype, device=device or one.device
        ),
        torch.Tensor.__int__: lambda one: int(one.item()),
        torch.Tensor.__float__: lambda one: float(one.item()),
        torch.Tensor.__invert__: torch.bitwise_not,
        torch.Tensor.__index__: lambda one: one.item(),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.METHODS:
            return self.METHODS[func](*args, **(kwargs or {}))
        indexes = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if not indexes or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        view, places = _indexed(args[0], args[1])
        if func is torch.Tensor.__getitem__:
            return aten.index.Tensor(view, places) if places else view
        value = args[2]
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, dtype=view.dtype, device=view.device)
        return aten.index_put_.default(view, places, value) if places else aten.copy_.default(view, value)


def _indexed(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view that integers, slices, None and ... select, and the tensors with which it is then indexed."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(one.dim() if isinstance(one, torch.Tensor) and one.dtype == torch.bool else 1
               for one in parts if one is not None and one is not Ellipsis)  # fmt: skip
    if any(one is Ellipsis for one in parts):
        place = next(number for number, one in enumerate(parts) if one is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - used)
    places: list[torch.Tensor | None] = []
    for one in parts:
        if one is None:
            tensor = tensor.unsqueeze(len(places))
        elif isinstance(one, int):
            tensor = tensor.select(len(places), one)
            continue
        elif isinstance(one, slice):
            tensor = aten.slice.Tensor(tensor, len(places), one.start, one.stop, one.step or 1)
        else:
            places.append(torch.as_tensor(one))
            continue
        places.append(None)
    return tensor, places if any(place is not None for place in places) else []


KINDS = {"weights": (_MemRefType.PARAM, _MemRefType.BUFFER), "gradients": (_MemRefType.GRAD,), "optimizer": (_MemRefType.OPT,),
         "activations": (_MemRefType.ACT, _MemRefType.TEMP), "other": (_MemRefType.OTH,)}  # fmt: skip
"""Kind of memory → MemTracker's types. Autocast's copies of weights are weights; temporary tensors of a backward pass are
activations, those of an optimizer's step are the optimizer's."""


class Peaks(MemTracker):
    """MemTracker that keeps the peak of each phase, by kind, instead of each module's."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, dict[str, int]] = {}
        self.phase = "load"

    def track(self, *modules: torch.nn.Module) -> None:
        """Count the modules' parameters as weights, and what becomes their gradients as gradients."""
        for module in modules:
            self._track_module_params_and_buffers(module, install_grad_hooks=False)
            for parameter in module.parameters():
                if parameter.requires_grad and parameter not in self._param_to_grad_hook_handles:
                    self._param_to_grad_hook_handles[parameter] = (
                        parameter.register_hook(self._is_gradient),
                        parameter.register_post_accumulate_grad_hook(lambda one: self._is_gradient(one.grad)),
                    )

    def _is_gradient(self, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            self._update_and_maybe_create_winfos(gradient, _MemRefType.GRAD)

    def enter(self, phase: str) -> None:
        """Begin a phase, which may be one that has been before."""
        self.phase = phase
        self._keep_peak()

    def _keep_peak(self) -> None:
        now = sum(device[_TOTAL_KEY] for device in self._curr_mem_snap.values())
        if now > self.phases.get(self.phase, {}).get("total", -1):
            kinds = {kind: sum(device[one] for device in self._curr_mem_snap.values() for one in types)
                     for kind, types in KINDS.items()}  # fmt: skip
            self.phases[self.phase] = {**kinds, "total": now}

    def _update_peak_stats(self, peak_state: Any) -> None:
        self._keep_peak()

    def __enter__(self) -> Peaks:
        super().__enter__()
        self._mod_tracker.__exit__()  # hooks in modules, which no phase needs and which keep tensors alive
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._to_copy.default and not self._in_opt and isinstance(args[0], torch.nn.Parameter):
            self._update_and_maybe_create_winfos(made, _MemRefType.PARAM)
        return made


@contextlib.contextmanager
def fake_tensors() -> Iterator[KnownValues]:
    """Context in which every tensor that is made is fake, and the values of small ones are known."""
    mode, swap = FakeTensorMode(allow_non_fake_inputs=True), torch.utils.swap_tensors

    def swap_tensors(one: torch.Tensor, other: torch.Tensor) -> None:
        if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
            mode.fake_tensor_converter.meta_converter.tensor_memo.clear()  # its weak references would prevent the swap
            swap(one, other)

    torch.utils.swap_tensors = swap_tensors
    deepcopy, FakeTensor.__deepcopy__ = FakeTensor.__deepcopy__, lambda one, memo: one.detach().clone()
    try:
        with mode, KnownValues() as known, WithoutCUDA():
            yield known
    finally:
        torch.utils.swap_tensors, FakeTensor.__deepcopy__ = swap, deepcopy
