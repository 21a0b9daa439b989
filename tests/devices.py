"""Two devices on a machine that has one: tensors that hold their numbers on the CPU, say that they are on `cpu:1`, and refuse to meet others."""
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

OTHER = torch.device("cpu", 1)


class There(torch.Tensor):
    "A tensor of the other device."
    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=OTHER)
        made.inner = inner
        return made

    def __repr__(self): return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    "An operation of tensors that are all here, or all there; as on a GPU, single numbers and indices may come from the CPU."
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, There) for x in given]
    target, moves = kwargs.get("device"), func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and there[0]
    needed = [args[0], *args[2:3]] if indexed else given
    if not moves and any(there) and not all(isinstance(x, There) or x.ndim == 0 for x in needed):
        raise RuntimeError(f"{func}: tensors are on two devices")
    goes = any(there) if target is None else torch.device(target) == OTHER
    kwargs = kwargs | ({"device": "cpu"} if target is not None else {})
    args, kwargs = tree_map_only(There, lambda x: x.inner, (args, kwargs))
    found = func(*args, **kwargs)
    if func is torch.ops.aten.copy_.default: return given[0]
    return tree_map_only(torch.Tensor, There, found) if goes else found


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    "What is below all dispatch: `torch.tensor` and `tolist`."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], There): return args[0].inner.tolist()
        if func is torch.tensor: args = tree_map_only(There, lambda x: x.inner, args)
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu") != OTHER: return func(*args, **kwargs)
        return func(*args, **kwargs | {"device": "cpu"}).to(OTHER)


@contextmanager
def two_devices():
    "Inside, `cpu:1` is another device than `cpu`."
    with _Operations(), _Literals(): yield


def put_there(model):
    "All of a model that is read only, on the other device."
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None: module._parameters[name] = torch.nn.Parameter(There(p.detach()), requires_grad=False)
        for name, x in module._buffers.items():
            if x is not None: module._buffers[name] = There(x)
    return model
