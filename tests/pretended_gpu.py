"""A GPU that a machine without one pretends to have: tensors say ``cuda`` and are computed on the processor.

An operation between the two devices fails as it does on a real GPU, and what makes the processor wait for the GPU is
counted. Values are real, so that steps which depend on them can be run too.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# Their index may lie on the processor, from where it is copied.
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_COPIES = (aten.copy_.default, aten._to_copy.default)
# The size of their result depends on values.
_SIZED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
)
_SCALARS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on the GPU; ``inner`` holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            # torch's own code asks the driver about a tensor on a GPU, but not about one without values.
            device=torch.device("meta"),
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner.detach()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def __getitem__(self, index):
        # torch would make a tensor of a list where it takes this one to lie.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"OnGpu({self.inner})"

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied = OnGpu(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of a PretendedGpu")

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendedGpu(TorchDispatchMode):
    """While it is active there is a GPU.

    Attributes:
        waits: How often the processor waited for it, by the name of the operation.
        copies: How often tensors of more than one value were copied to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies = 0

    def __enter__(self):
        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(torch.cuda, "_lazy_init", lambda: None)
        self._patches.setattr(torch.Tensor, "new_tensor", _new_tensor)
        self._patches.setattr(threading.Thread, "run", self._in_thread(threading.Thread.run))
        self._lifts = torch._C._only_lift_cpu_tensors()
        # As torch's own fake tensors do: what is made of Python's numbers begins on the processor.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.undo()
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    def _in_thread(self, run):
        """A thread's ``run`` that has the GPU too: modes belong to the thread that has entered them."""

        def with_gpu(thread) -> None:
            with self._active():
                run(thread)

        return with_gpu

    @contextmanager
    def _active(self):
        """Within it operations come here; what surrounds all of it is left as it is."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function._can_decompose():
            # In torch's inference mode these come as a whole.
            with self._active():
                return function.decompose(*args, **kwargs)
        found = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        on_gpu = any(isinstance(value, OnGpu) for value in found)
        to_gpu = on_gpu
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type in ("cuda", "meta")
            kwargs["device"] = torch.device("cpu")
        if not on_gpu and not to_gpu:
            return function(*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        self._check(function, args, found, on_gpu=on_gpu)
        self._count(function, args, found, on_gpu=on_gpu, to_gpu=to_gpu)
        plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
        if function is aten._to_copy.default and on_gpu != to_gpu:
            # A copy even where both are the processor's.
            result = function(*plain_args, **plain_kwargs)
            return OnGpu(result) if to_gpu else result
        result = function(*plain_args, **plain_kwargs)
        if function is aten.copy_.default and not isinstance(args[0], OnGpu):
            return args[0]
        if not to_gpu:
            return result
        wrapped = tree_map(lambda value: OnGpu(value) if isinstance(value, torch.Tensor) else value, result)
        return return_and_correct_aliasing(function, args, kwargs, wrapped) if on_gpu else wrapped

    def _check(self, function, args, found: Sequence[torch.Tensor], *, on_gpu: bool) -> None:
        strangers = [value for value in found if not isinstance(value, OnGpu) and value.ndim]
        if not on_gpu or not strangers or function in _COPIES:
            return
        if function in _INDEXED and isinstance(args[0], OnGpu):
            return
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found cuda:0 and cpu")

    def _count(self, function, args, found: Sequence[torch.Tensor], *, on_gpu: bool, to_gpu: bool) -> None:
        masks = function in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        fetched = function in _COPIES and on_gpu and not (to_gpu and isinstance(args[0], OnGpu))
        if on_gpu and (function in _SIZED_BY_VALUES or function in _SCALARS or masks or fetched):
            self.waits[str(function)] += 1
        elif (
            function in _COPIES and to_gpu and found and any(not isinstance(v, OnGpu) and v.numel() > 1 for v in found)
        ):
            self.copies += 1


def _new_tensor(like: torch.Tensor, values, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch's own does not ask a subclass where it lies."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)


def _inner(value):
    return value.inner if isinstance(value, OnGpu) else value
