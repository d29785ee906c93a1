"""Devices that are not there: tensors that compute on the CPU, say that they are on ``lazy:0`` or ``lazy:1``, and
refuse to be mixed, as tensors of two GPUs are. The numbers are real, so a model that is spread over them can be
compared bit for bit with one that is not.

``lazy`` is a device type of torch that needs no runtime, so torch itself never looks for one. What is called on such a
tensor is called on the tensor inside; where a gradient is wanted, autograd stays outside and its single steps are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")
HOST = torch.device("cpu")

_MOVES = ("to", "cpu", "copy_", "_to_copy")
_TAKES_INDICES = ("__getitem__", "__setitem__", "index", "index_put", "index_put_")


class MixedDevicesError(RuntimeError):
    """An operation over tensors of several devices."""


class Placed(torch.Tensor):
    """A tensor on a device that is not there."""

    @staticmethod
    def __new__(cls, inside, device=None, requires_grad=False):
        if device is None:  # accelerate makes a parameter of the kind that was there before
            return torch.nn.Parameter(inside, requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=device,
            requires_grad=requires_grad,
        )

    def __init__(self, inside, device=None, requires_grad=False):
        if device is not None:
            self.inside = inside

    def __repr__(self, *, tensor_contents=None):
        return f"Placed({self.inside!r}, {self.device})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function == torch.Tensor.data.__set__:
                own, new = args
                if new.device != own.device:
                    raise MixedDevicesError(f"data of {new.device} for a tensor on {own.device}")
                own.inside = new.inside
            if _is_outside(function) or (torch.is_grad_enabled() and _wants_gradient(args, kwargs)):
                return function(*args, **(kwargs or {}))
            return _run(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            parts = function.decompose(*args, **(kwargs or {}))  # in inference mode such come here whole
            if parts is not NotImplemented:
                return parts
        return _run(function, args, kwargs or {})


class _Made(TorchFunctionMode):
    """What makes a tensor on a device that is not there, or moves one of the host to it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_outside(function) or _any_placed((args, kwargs)) or _asked_device(function, args, kwargs) is None:
            return function(*args, **kwargs)
        wants = kwargs.get("requires_grad", False)
        made = _run(function, args, {key: value for key, value in kwargs.items() if key != "requires_grad"})
        return made.requires_grad_() if wants else made


class gradients(TorchDispatchMode):
    """Where gradients are wanted: sees also the tensors that autograd makes by itself."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def fake_devices() -> Iterator[None]:
    """While the block runs, ``lazy:0`` and ``lazy:1`` can be computed on."""
    with _Made():
        yield


def place(tensor, device):
    """A tensor of the CPU on a device that is not there."""
    return Placed(tensor, device)


def spread(model, device_of, *, offloaded=()):
    """Spread a Hugging Face model as accelerate's ``dispatch_model`` does, over devices that are not there.

    Args:
        model: On the CPU; changed in place.
        device_of: From a module's name to its device.
        offloaded: Beginnings of names of modules whose weights wait on the host between two passes.
    """
    blocks = [f"model.layers.{each}" for each in range(len(model.model.layers))]
    for name, module in model.named_modules():
        own = [*module._parameters, *module._buffers]
        waits = bool(own and offloaded) and name.startswith(tuple(offloaded))
        if not own and name not in ("", *blocks):
            continue
        if not waits:
            for kind in (module._parameters, module._buffers):
                kind.update({key: _moved(tensor, device_of(name)) for key, tensor in kind.items()})
        hook = AlignDevicesHook(device_of(name), offload=waits, io_same_device=name == "", skip_keys="past_key_values")
        add_hook_to_module(module, hook, append=True)
    places = {name: device_of(name) for name in ("model.embed_tokens", *blocks, "model.norm", "lm_head")}
    model.hf_device_map = {name: "cpu" if name in offloaded else str(device) for name, device in places.items()}
    return model


def _moved(tensor, device):
    if tensor is None:
        return None
    moved = Placed(tensor.detach(), device)
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved


def _wants_gradient(args, kwargs):
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in tree_leaves((args, kwargs or {})))


def _is_outside(function):
    """Whether it asks for or sets what the tensor says of itself, such as its device."""
    return function.__name__ in ("__get__", "__set__", "requires_grad_", "detach", "dim", "size", "stride", "numpy")


def _run(function, args, kwargs):
    if _name(function) == "_has_compatible_shallow_copy_type":
        return False
    asked, here = _asked_device(function, args, kwargs), _device(function, args, kwargs)
    goal = args[0].device if _name(function) in ("copy_", "__setitem__") else asked or here
    with torch._C.DisableTorchFunction():
        results = function(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    return tree_map(lambda each: _wrapped(each, goal, args), results)


def _name(function):
    return function.__name__.partition(".")[0]


def _asked_device(function, args, kwargs):
    """The device that a call names, as an argument or as that of a tensor that is to be matched."""
    if _name(function) == "cpu":
        return HOST
    named = [kwargs["device"]] if kwargs.get("device") is not None else []
    if _name(function) == "to":
        given = [*args[1:2], *kwargs.values()]
        named += [each.device for each in given if isinstance(each, torch.Tensor)]
        named += [each for each in given if isinstance(each, str | torch.device)]
    lazy = [torch.device(each) for each in named]
    return lazy[0] if lazy and (lazy[0].type == "lazy" or _any_placed(args)) else None


def _any_placed(args):
    return any(isinstance(each, Placed) for each in tree_leaves(args))


def _device(function, args, kwargs):
    """The one device of a call's tensors; numbers of the host go with any, as they do with a GPU's."""
    name = _name(function)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    if name in _TAKES_INDICES:  # a GPU takes indices of the host
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, torch.Tensor)]
        tensors = [each for each in tensors if each.device != HOST or all(each is not index for index in indices)]
    devices = {each.device for each in tensors if each.ndim or each.device != HOST}
    if len(devices) > 1 and name not in _MOVES:
        raise MixedDevicesError(f"{name} over tensors of {sorted(map(str, devices))}")
    return next(iter(devices), HOST)


def _inside(each):
    if isinstance(each, Placed):
        return each.inside
    if isinstance(each, torch.device) and each.type == "lazy":
        return HOST
    return "cpu" if isinstance(each, str) and each.startswith("lazy:") else each


def _wrapped(each, device, args):
    if not isinstance(each, torch.Tensor):
        return each
    for given in tree_leaves(args):  # what is written in place is the very tensor
        if isinstance(given, Placed) and given.inside is each and given.device == device:
            return given
    return Placed(each, device) if device.type == "lazy" and not isinstance(each, Placed) else each
