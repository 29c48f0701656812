"""A simulated accelerator: tensors that lie on the CPU and behave as on CUDA, with what passes to and fro counted.

They report the device `sim`. An operation that mixes them with a CPU tensor of one or more dimensions fails, so does
`.numpy()`; every value that is read back to the host is noted, and every tensor that is copied to the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME, CPU = "sim", torch.device("cpu")
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
FACTORIES = (  # of those that PyTorch does not put together from others
    aten.empty.memory_format, aten.empty_strided.default, aten.arange.start_step, aten.linspace.default,
    aten.eye.default, aten.eye.m, aten.randperm.default, aten.randperm.generator, aten.tril_indices.default,
)  # fmt: skip
SYNCS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host needs values to go on
TORCH = str(Path(torch.__file__).parent)


@dataclass
class Traffic:
    """What passed while it was watched: for each time the line of code, `file:line`, and the shape."""

    reads: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    copies: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


_WATCHING: list[Traffic] = []
_PRESENT = False


@contextmanager
def watched() -> Iterator[Traffic]:
    """Counts inside the `with`."""
    traffic = Traffic()
    _WATCHING.append(traffic)
    try:
        yield traffic
    finally:
        _WATCHING.remove(traffic)


def _note(kind: str, tensor: Tensor) -> None:
    """By the line of code outside of PyTorch that asked for it."""
    frame: Any = sys._getframe(1)
    while frame and (frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    site = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
    for traffic in _WATCHING if tensor.numel() else []:
        getattr(traffic, kind).append((site, tuple(tensor.shape)))


class SimTensor(Tensor):
    """A tensor of the device; `raw` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=torch.device(NAME, 0), **layout)
        out.raw = raw
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}: {self.cpu()}"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


class SimGenerator(torch.Generator):
    """Of the device, too: a backend in Python can't have one of its own."""

    def __new__(cls, device: Any = CPU) -> SimGenerator:
        return super().__new__(cls, CPU if torch.device(device).type == NAME else device)


def _each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A function of every tensor in arguments or results."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([_each(x, function) for x in value])
    return value if type(value) is not dict else {k: _each(x, function) for k, x in value.items()}


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the values of its tensors."""
    ours, host = list[SimTensor](), list[Tensor]()

    def unwrap(t: Tensor) -> Tensor:
        (ours if isinstance(t, SimTensor) else host).append(t)
        return getattr(t, "raw", t)

    values, options = _each(args, unwrap), _each(kwargs, unwrap)
    if options.get("device") is not None:
        options["device"] = CPU
    stays = kwargs.get("device") is None or torch.device(kwargs["device"]).type == NAME
    indices = [i for i in args[1] if i is not None] if op in INDEXING else []
    for i in indices:  # CUDA takes them from the host as well, and copies them; masks are counted first
        if not isinstance(i, SimTensor) or i.dtype == torch.bool:
            _note("reads" if isinstance(i, SimTensor) else "copies", i)
    if op is aten.copy_.default:
        if host:
            _note("reads" if args[0] is host[0] else "copies", host[0])
    elif ours and any(t.dim() and not any(t is i for i in indices) for t in host):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu, in {op}.")
    elif not indices and (not stays or SYNCS & set(op.tags)):
        _note("reads", ours[0])
    wrapped = {id(t.raw): t for t in ours}
    if op is aten.histc.default:  # the CPU has it for floating numbers only
        values = (values[0].float(), *values[1:])
    out = op(*values, **options)
    if op is aten.histc.default:
        out = out.to(ours[0].dtype)

    def wrap(t: Tensor) -> Tensor:
        if not stays or any(t is x for x in host):
            return t
        return wrapped[id(t)] if id(t) in wrapped else SimTensor(t)

    return _each(out, wrap)


class _Backend(_DummyBackendModule):
    def is_available(self) -> bool:
        return _PRESENT


@cache
def _set_up() -> torch.library.Library:
    """Once a process; PyTorch can't forget a backend."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", lambda source, to, _=False: _run(aten.copy_.default, to, source), "PrivateUse1")
    for op in (aten._local_scalar_dense.default, *FACTORIES):
        library.impl(op, partial(_run, op), "PrivateUse1")
    return library


@contextmanager
def present() -> Iterator[torch.device]:
    """The machine has the device inside the `with`: it is PyTorch's current accelerator."""
    global _PRESENT
    _set_up()
    try:
        _PRESENT = True
        # the threads of backward know the devices of the process's first backward only
        with patch.object(torch, "Generator", SimGenerator), torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
    finally:
        _PRESENT = False
