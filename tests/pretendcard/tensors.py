"""Tensors of the pretend card: they say cuda:N, hold CPU data, and check every operator as CUDA would."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretendcard import kernels
from tests.pretendcard.state import State

aten = torch.ops.aten
_CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
BACKWARD = -1  # as ``home``: that of the operator before, since a graph may have parts on several devices
_active: list[State] = []  # at most one
_local = (
    threading.local()
)  # .home: where an operator inside a call makes its temporary tensors; .last: that of the last
_pinned: dict[int, int] = {}  # address of a pinned storage → 1
_generators: dict[int, int] = {}  # address of a generator of the card → index

# Ops that wait for the card because the size or value of their result is needed on the CPU.
WAITS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "equal": "equal",
    "bincount": "bincount",
    "repeat_interleave": "repeat_interleave",
    "_linalg_check_errors": "linalg",  # inv, solve, cholesky, …: whether it worked
    "_linalg_svd": "svd",
    "_linalg_eigh": "eigh",
}
INDEXING = frozenset(
    {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
)
# Take a 0-dim CPU tensor beside tensors of the card, although they are not tagged as pointwise.
TAKES_NUMBERS = INDEXING | {
    "fill_",
    "fill",
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "_fused_adamw_",
    "_fused_adam_",
    "full_like",
    "masked_scatter",
}
COPIES = frozenset({"_to_copy", "copy_", "copy"})


def state() -> State:
    """The active card."""
    if not _active:
        raise RuntimeError("no pretend card is active: use it inside its with block")
    return _active[-1]


class CardTensor(torch.Tensor):
    """A tensor on the pretend card.  ``_elem`` is the CPU tensor with the same storage; ``_index`` the card."""

    _elem: torch.Tensor
    _index: int

    @staticmethod
    def of(elem: torch.Tensor, index: int) -> CardTensor:
        """The CPU tensor as one of card ``index``; both share the storage."""
        made = torch.Tensor._make_subclass(CardTensor, elem.detach(), False, device_for_backend_keys=_CUDA)
        made._elem, made._index = elem, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    # What the C++ side answers as for a CPU tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self._index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return self._index

    def type(self, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is None:
            return torch.Tensor.type(self._elem).replace("torch.", "torch.cuda.")
        return self.to(dtype)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        return None

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self._elem!r}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        made = self.detach().clone()
        if getattr(self, "_is_param", False):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        else:
            made.requires_grad_(self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """torch.save waits and copies.  Unlike on CUDA, the file names the CPU as the place of the tensor."""
        state().waited("torch.save of a tensor")
        state().moved(self._elem.numel() * self._elem.element_size(), to_card=False)
        plain: torch.Tensor = self._elem.detach()
        if getattr(self, "_is_param", False):
            plain = torch.nn.Parameter(plain, requires_grad=self.requires_grad)
        return plain.__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        set_data(self, value)

    # Between devices

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return moved_to(self, *args, **kwargs)

    def type_as(self, other: torch.Tensor) -> torch.Tensor:
        return moved_to(self, other)

    def cpu(self, memory_format: Any = torch.preserve_format) -> torch.Tensor:  # type: ignore[override]
        return moved_to(self, _CPU, memory_format=memory_format)

    def cuda(self, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return moved_to(self, card_device(device), non_blocking=non_blocking)


def card_device(device: Any) -> torch.device:
    """A device argument as a full device; None and ``cuda`` are the current card."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device("cuda" if device is None else device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", current())
    return found


def current() -> int:
    return getattr(_local, "current", 0)


def set_current(index: int) -> None:
    _local.current = index


def check_index(index: int) -> int:
    """Raise what CUDA raises for a card that is not there."""
    if index >= len(state().memories):
        raise torch.AcceleratorError(
            "CUDA error: invalid device ordinal\nCUDA kernel errors might be asynchronously reported at some other "
            "API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
            "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
        )
    return index


def wrapped(elem: torch.Tensor, index: int) -> CardTensor:
    """A CPU result as a tensor of the card; its storage is counted if it is new there."""
    state().allocate(index, elem.untyped_storage())
    return CardTensor.of(elem, index)


# Moving


class _Move(torch.autograd.Function):
    """A differentiable copy between devices: C++ autograd takes both sides for CPU tensors."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, device: torch.device, dtype: Any, non_blocking: bool
    ) -> torch.Tensor:
        ctx.device, ctx.dtype = tensor.device, tensor.dtype
        return _copied(tensor, device, dtype, non_blocking, None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return moved_to(gradients[0], ctx.device, ctx.dtype), None, None, None


def moved_to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``tensor.to(…)``, where the tensor or the target is of the card."""
    device, dtype, non_blocking, copy, memory_format = _to_arguments(args, kwargs)
    target = tensor.device if device is None else card_device(device)
    if target == tensor.device:
        if dtype is None:
            dtype = tensor.dtype
        return torch.Tensor.to(tensor, dtype, copy=copy, memory_format=memory_format or torch.preserve_format)
    if target.type not in ("cpu", "cuda"):
        return torch.Tensor.to(tensor._elem if isinstance(tensor, CardTensor) else tensor, target, dtype)
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Move.apply(tensor, target, dtype, non_blocking)  # type: ignore[no-any-return]
    return _copied(tensor, target, dtype, non_blocking, memory_format)


def _to_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool, bool, Any]:
    rest = list(args)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    other = kwargs.get("other")
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
    if other is not None:
        device, dtype = other.device, other.dtype
    elif rest and isinstance(rest[0], torch.dtype):
        dtype = rest.pop(0)
    elif rest and (rest[0] is None or isinstance(rest[0], str | int | torch.device)):
        device = rest.pop(0)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            dtype = rest.pop(0)
    non_blocking = bool(rest[0]) if rest else bool(kwargs.get("non_blocking", False))
    copy = bool(rest[1]) if len(rest) > 1 else bool(kwargs.get("copy", False))
    return device, dtype, non_blocking, copy, kwargs.get("memory_format")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._elem if isinstance(tensor, CardTensor) else tensor


def _copied(
    tensor: torch.Tensor, target: torch.device, dtype: Any, non_blocking: bool, memory_format: Any
) -> torch.Tensor:
    """A copy on another device.  The bytes are those of the target's dtype, or of the source's if the cast is made
    on the card."""
    elem = _plain(tensor).detach()
    form = memory_format or torch.preserve_format
    with torch._C._DisableTorchDispatch():
        copy = aten._to_copy.default(elem, dtype=dtype or elem.dtype, memory_format=form)
    _count_copy(tensor, copy, target, non_blocking)
    return wrapped(copy, check_index(target.index)) if target.type == "cuda" else copy


def _count_copy(tensor: torch.Tensor, copy: torch.Tensor, target: torch.device, non_blocking: bool) -> None:
    card, nbytes = state(), copy.numel() * copy.element_size()
    if tensor.device.type == "cuda" and target.type == "cuda":
        card.launched("copy between cards", 1)
        return
    to_card = target.type == "cuda"
    if copy.numel() == 0:
        return
    card.moved(nbytes, to_card=to_card)
    if to_card:
        if not non_blocking:
            card.waited("blocking copy to the card")
        elif not is_pinned(tensor):
            card.waited("copy of unpinned memory to the card")
    elif non_blocking:
        pin(copy)  # PyTorch takes pinned memory for the target
    else:
        card.waited("blocking copy from the card")


def is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, CardTensor) and tensor.untyped_storage()._cdata in _pinned


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Mark the storage of a CPU tensor as pinned."""
    storage = tensor.untyped_storage()
    if storage._cdata not in _pinned:
        _pinned[storage._cdata] = 1
        weakref.finalize(storage, _pinned.pop, storage._cdata, None).atexit = False
    return tensor


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value`` between any devices; the object stays the same."""
    if isinstance(tensor, CardTensor) == isinstance(value, CardTensor):
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
        if isinstance(tensor, CardTensor) and isinstance(value, CardTensor):
            tensor._elem, tensor._index = value._elem, value._index
        return
    own = {name: each for name, each in vars(tensor).items() if name not in ("_elem", "_index")}
    if isinstance(tensor, torch.nn.Parameter):
        made: torch.Tensor = torch.nn.Parameter(value.detach(), requires_grad=tensor.requires_grad)
    else:
        made = value.detach().requires_grad_(tensor.requires_grad)
    gradient, tensor.grad = tensor.grad, None
    torch.utils.swap_tensors(tensor, made)
    vars(tensor).update(own)
    tensor.grad = gradient  # of the old device, as on CUDA


# Operators


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator.  Without a tensor of the card, and not for the card, it is an ordinary one."""
    name = func._schema.name[6:] if func.namespace == "aten" else func._schema.name
    found: list[CardTensor] = []
    others: list[torch.Tensor] = []
    _collect(args, found, others)
    _collect(kwargs.values(), found, others)
    if found or others:
        _local.last = found[0]._index if found else None
    wanted = kwargs.get("device")
    to_card = wanted is not None and wanted.type == "cuda"
    if not found and not to_card and (home := _home_of(func, wanted, others)) is not None:
        to_card, wanted = True, torch.device("cuda", home)
    if not found and not to_card:
        return _on_cpu(func, name, args, kwargs)
    if name in COPIES:
        return _copy(func, name, args, kwargs)
    index = found[0]._index if found else check_index(card_device(wanted).index)
    _check_devices(func, name, args, found, others)
    if found and to_card and card_device(wanted).index != index:
        index = check_index(card_device(wanted).index)
    elif found and wanted is not None and wanted.type == "cpu" and not _is_implicit(found):
        index = -1  # ones_like(card, device="cpu")
    _check_generators("cuda", args, kwargs)
    card = state()
    if name in kernels.MATMUL:
        card.enter_library("matmul", index)
    elif name in kernels.CONV:
        card.enter_library("conv", index)
    what = WAITS.get(name)
    if what and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
        card.waited(what)
    if name in INDEXING:
        _check_indices(args, card)
    if name == "_local_scalar_dense":
        card.moved(found[0].element_size(), to_card=False)
    card.launched(name, kernels.launches(func, name, args, kwargs))
    known = {id(each._elem): each for each in found}
    given = tuple(_unwrapped(each) for each in args)
    named = {key: _unwrapped(each) for key, each in kwargs.items()}
    if wanted is not None:
        named["device"] = _CPU
    named.pop("pin_memory", None)
    result = _wide(func, given, named) if func in WIDE else func(*given, **named)
    return result if index < 0 else _wrapped_all(result, index, known)


WIDE = (aten.mm.dtype, aten.addmm.dtype, aten.bmm.dtype, aten.baddbmm.dtype)


def _wide(func: Any, given: Any, named: Any) -> Any:
    """Matrix products with an out_dtype, which only CUDA has: the factors in 16 bits, the sum in fp32."""
    *factors, kind = given
    if factors[0].dtype not in (kind, factors[1].dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    return func.overloadpacket(*(each.to(kind) for each in factors), **named)


def _on_cpu(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """An operator of the CPU; only pinned memory and generators are seen to."""
    if name == "is_pinned":
        return is_pinned(args[0])
    if name == "_pin_memory":
        return pin(args[0].clone())
    pinned = kwargs.get("pin_memory")
    if pinned:
        kwargs = {**kwargs, "pin_memory": False}
    if kwargs.get("generator") is not None:
        _check_generators("cpu", args, kwargs)
    result = func(*args, **kwargs)
    return pin(result) if pinned else result


def _copy(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """_to_copy and copy_: the copies between devices, and casts on the card."""
    if name == "_to_copy":
        source = args[0]
        wanted = kwargs.get("device")
        target = source.device if wanted is None else card_device(wanted)
        if (
            isinstance(source, CardTensor)
            and target.type == "cpu"
            and getattr(_local, "home", None) is not None
        ):
            target = source.device  # C++ asked for the device it takes the tensor to be on
        if target == source.device:
            state().launched(name, 1)
            rest = {key: each for key, each in kwargs.items() if key not in ("device", "pin_memory")}
            return wrapped(func(source._elem, **rest), source._index)
        return _copied(
            source, target, kwargs.get("dtype"), bool(kwargs.get("non_blocking")), kwargs.get("memory_format")
        )
    into, source = args[0], args[1]
    non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
    if into.device == source.device:
        state().launched(name, 1)
    elif source.device.type == "cuda" and into.device.type == "cpu":
        state().moved(source.numel() * source.element_size(), to_card=False)
        if not (non_blocking and is_pinned(into)):
            state().waited("blocking copy from the card")
    else:
        _count_copy(source, source, into.device, non_blocking)
    result = func(_plain(into), _plain(source))
    return into if name == "copy_" else wrapped(result, into._index)


def _is_implicit(found: list[CardTensor]) -> bool:
    """Whether device=cpu comes from C++, which takes the card's tensors for CPU tensors."""
    return getattr(_local, "home", None) is not None


def _home_of(func: Any, wanted: Any, others: list[torch.Tensor]) -> int | None:
    """The card on which C++ inside a call on its tensors makes a temporary tensor; None: an ordinary one."""
    home = getattr(_local, "home", None)
    if home is None or others or wanted is None or wanted.type != "cpu":
        return None
    last: int | None = getattr(_local, "last", None)
    return last if home == BACKWARD else int(home)


def _collect(values: Any, found: list[CardTensor], others: list[torch.Tensor]) -> None:
    for each in values:
        if isinstance(each, CardTensor):
            found.append(each)
        elif isinstance(each, torch.Tensor):
            others.append(each)
        elif isinstance(each, list | tuple):
            _collect(each, found, others)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, CardTensor):
        return value._elem
    if isinstance(value, list | tuple):
        return type(value)(_unwrapped(each) for each in value)
    return value


def _wrapped_all(value: Any, index: int, known: dict[int, CardTensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else wrapped(value, index)
    if isinstance(value, list):
        return [_wrapped_all(each, index, known) for each in value]
    if isinstance(value, tuple):
        return tuple(_wrapped_all(each, index, known) for each in value)
    return value


# Checks


def _check_devices(
    func: Any, name: str, args: Any, found: list[CardTensor], others: list[torch.Tensor]
) -> None:
    """Raise as CUDA does if tensors of several devices meet."""
    devices = dict.fromkeys(each.device for each in found)
    if len(devices) > 1:
        raise _mixed(*list(devices)[:2])
    if not found or not others:
        return
    if name in INDEXING and not isinstance(args[0], CardTensor):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    takes_numbers = torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS or name.startswith("_foreach_")
    allowed = _indices(args) if name in INDEXING else []
    for each in others:
        if any(each is one for one in allowed) and each.device.type == "cpu":
            continue
        if not (each.dim() == 0 and each.device.type == "cpu" and takes_numbers):
            raise _mixed(found[0].device, each.device, "" if takes_numbers else name)


def _mixed(one: torch.device, other: torch.device, method: str = "") -> RuntimeError:
    if method:
        return RuntimeError(
            f"Expected all tensors to be on the same device, but got a tensor on {other}, different from other "
            f"tensors on {one} (when checking argument in method wrapper_CUDA_{method})"
        )
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}!"
    )


def _indices(args: Any) -> list[torch.Tensor]:
    return [each for each in args[1] if isinstance(each, torch.Tensor)]


def _check_indices(args: Any, card: State) -> None:
    """Masks are turned into indices, which waits; indices on the CPU are copied."""
    if not isinstance(args[0], CardTensor):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    for each in _indices(args):
        if each.dtype in (torch.bool, torch.uint8):
            card.waited("indexing with a mask")
        if not isinstance(each, CardTensor):
            card.moved(each.numel() * each.element_size(), to_card=True)
            card.waited("indices copied to the card")


def _check_generators(kind: str, args: Any, kwargs: Any) -> None:
    for each in (*args, *kwargs.values()):
        if isinstance(each, _RealGenerator):
            have = "cuda" if _address(each) in _generators else "cpu"
            if have != kind:
                raise RuntimeError(f"Expected a '{kind}' device type for generator but found '{have}'")


# Generators


_RealGenerator = torch.Generator


def _address(generator: Any) -> int:
    """Of the C++ generator: operators get another Python object for it."""
    return int(generator._cdata)


class _GeneratorType(type(_RealGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _RealGenerator)


class CardGenerator(_RealGenerator, metaclass=_GeneratorType):
    """Stands for torch.Generator: one of ``cuda`` draws a CPU generator's numbers, but only for the card."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made: Any = _RealGenerator.__new__(cls, "cpu")  # type: ignore[call-arg]
        place = card_device(device) if torch.device(device).type == "cuda" else _CPU
        if place.type == "cuda":
            _generators[_address(made)] = check_index(place.index)
            made._place = place
            weakref.finalize(made, _generators.pop, _address(made), None).atexit = False
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return getattr(self, "_place", _CPU)


# Modes


class DispatchMode(TorchDispatchMode):
    """Sees operators that make tensors of the card from none: factories and copies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operator imports torch._dynamo, and every one goes through it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class FunctionMode(TorchFunctionMode):
    """Sees calls of torch's Python interface before C++ asks a tensor for its device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            done = special(self, func, args, kwargs)
            if done is not NotImplemented:
                return done
        before = getattr(_local, "home", None)
        _local.home = None if kwargs.get("device") is not None else _card_of(args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            _local.home = before


def _card_of(args: Any, kwargs: Any) -> int | None:
    found: list[CardTensor] = []
    _collect(args, found, [])
    if not found and kwargs:
        _collect(kwargs.values(), found, [])
    return found[0]._index if found else None


def _to(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not isinstance(tensor, CardTensor) and func is not torch.Tensor.cuda:
        device = _to_arguments(args[1:], kwargs)[0]
        if device is None or (isinstance(device, str) and device.startswith(("cpu", "meta"))):
            return NotImplemented
        if not isinstance(device, int) and torch.device(device).type != "cuda":
            return NotImplemented
    if func is torch.Tensor.cuda:
        return moved_to(
            tensor,
            card_device(args[1] if len(args) > 1 else kwargs.get("device")),
            non_blocking=kwargs.get("non_blocking", False),
        )
    return moved_to(*args, **kwargs)


def _type_as(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    return moved_to(args[0], args[1]) if isinstance(args[1], CardTensor) else NotImplemented


def _set_data(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, value = args
    if isinstance(tensor, CardTensor) or isinstance(value, CardTensor):
        return set_data(tensor, value)
    return NotImplemented


def _is_pinned(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    return is_pinned(args[0])


def _pin_memory(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if is_pinned(args[0]) else pin(args[0].detach().clone())


def _backward(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("gradient", "retain_graph", "create_graph", "inputs")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    before = getattr(_local, "home", None)
    _local.home = BACKWARD
    try:
        with mode:  # Python code inside the backward pass is seen again
            return torch.autograd.backward(
                args[0],
                given.get("gradient"),
                given.get("retain_graph"),
                given.get("create_graph", False),
                inputs=given.get("inputs"),
            )
    finally:
        _local.home = before


def _from_data(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """torch.tensor and the like: made on the CPU and copied, which waits."""
    home = kwargs.get("device")
    if func is torch.Tensor.new_tensor:
        if home is None and isinstance(args[0], CardTensor):
            home = args[0].device
        args = args[1:]
    if home is None or torch.device(home).type != "cuda":
        return NotImplemented
    rest = {key: each for key, each in kwargs.items() if key not in ("device", "requires_grad")}
    made = torch.as_tensor if func is torch.as_tensor else torch.tensor
    return moved_to(made(*args, **rest), card_device(home)).requires_grad_(bool(kwargs.get("requires_grad")))


_SPECIAL: dict[Any, Any] = {
    torch.tensor: _from_data,
    torch.as_tensor: _from_data,
    torch.Tensor.new_tensor: _from_data,
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _to,
    torch.Tensor.type_as: _type_as,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.backward: _backward,
}
