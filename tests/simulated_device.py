"""A device that is none: tensors on ``sim`` are computed on the CPU, every wait of the host is recorded, and no
operation may mix the two. What a GPU would be asked to do can so be seen without one.

Recorded is what CUDA's sync debug mode reports: reading a value, operations whose output's size depends on values, and
copies between host and device that block. A copy with ``non_blocking=True`` passes, as it does there, unless it is one
that CUDA makes wait nevertheless: of more than 64 KB of the host's memory that is not pinned. `torch.autocast` has
CUDA's lists of operations, so types meet on ``sim`` as they do there.

    python tests/simulated_device.py '[["fit", "--config", ...], ...]'

runs these command lines of pretrain3d on it and prints, after all else, a line of JSON: exit status and waits of each.
It takes a process of its own, because a backend cannot be unregistered.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

WARM = 2  # steps that are not watched
PAGEABLE = 2**16  # bytes; up to so many CUDA copies from anywhere at once
aten = torch.ops.aten
READS_VALUES = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default, aten.linalg_inv_ex.default, aten.multinomial.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> torch.device:
    """Makes ``torch.device("sim")`` known to this process."""
    backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=_Backend())
    _register_autocast()
    torch.tensor, torch.as_tensor = _of_host(torch.tensor), _of_host(torch.as_tensor)
    torch.Tensor.new_tensor = lambda self, data, **more: torch.tensor(  # type: ignore[method-assign]
        data, **{"dtype": self.dtype, "device": self.device, **more}
    )
    to_list = Tensor.tolist
    Tensor.tolist = lambda self: to_list(self.cpu() if isinstance(self, OnDevice) else self)  # type: ignore[method-assign]
    torch.Generator = _generator  # type: ignore[misc, assignment]
    Tensor.pin_memory = _pinned  # type: ignore[method-assign]
    return torch.device("sim:0")


# PyTorch's aten/src/ATen/autocast_mode.h, as far as it is of use here
LOWER = """
conv1d conv2d conv3d conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm
mv linear addbmm baddbmm bmm scaled_dot_product_attention
"""
FULL = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm group_norm cosine_similarity nll_loss kl_div l1_loss smooth_l1_loss
huber_loss mse_loss binary_cross_entropy_with_logits dist cdist logsumexp upsample_nearest3d.vec
upsample_trilinear3d.vec prod prod.dim_int softmax.int
log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList norm.Scalar
norm.ScalarOpt_dim
"""
WIDEST = "addcdiv addcmul atan2 cross dot grid_sampler index_put scatter_add tensordot"
AUTOCAST = "AutocastPrivateUse1"
_KEPT: list[library.Library] = []  # they are taken back when they are collected


def _register_autocast() -> None:
    rest = library.Library("_", "IMPL")
    rest.fallback(library.fallthrough_kernel, AUTOCAST)
    listed = library.Library("aten", "IMPL")
    _KEPT.extend([rest, listed])
    for names, type_of in ((LOWER, _lower), (FULL, _full), (WIDEST, _widest)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            listed.impl(name, _casting(getattr(getattr(aten, packet), overload or "default"), type_of), AUTOCAST)


def _casting(op: Any, type_of: Callable[[list[torch.dtype]], torch.dtype]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def castable(leaf: Any) -> bool:
        return isinstance(leaf, OnDevice) and leaf.is_floating_point() and leaf.dtype != torch.float64

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            types = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if castable(leaf)]
            if types:
                wanted = type_of(types)
                args, kwargs = tree_map(lambda leaf: leaf.to(wanted) if castable(leaf) else leaf, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


def _lower(types: list[torch.dtype]) -> torch.dtype:
    return torch.get_autocast_dtype("sim")


def _full(types: list[torch.dtype]) -> torch.dtype:
    return torch.float32


def _widest(types: list[torch.dtype]) -> torch.dtype:
    return torch.float32 if torch.float32 in types else types[0]


class OnDevice(Tensor):
    """A tensor on ``sim``, whose numbers are in ``host``."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=torch.device("sim:0"),
        )  # fmt: skip
        made.host = host
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)  # a checkpoint is read on the CPU

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """Within it, factories make tensors on ``sim`` too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Watch:
    """Records waits while it is on.

    Attributes:
        waits: ``"what @ file:line < ..."``, the innermost line of the package first.
    """

    on = False
    waits: ClassVar[list[str]] = []

    @classmethod
    @contextlib.contextmanager
    def during(cls, on: bool) -> Iterator[None]:
        before, cls.on = cls.on, on
        try:
            yield
        finally:
            cls.on = before

    @classmethod
    def note(cls, what: str) -> None:
        if cls.on:
            frames = [frame for frame in traceback.extract_stack() if "/pretrain3d/" in frame.filename][::-1]
            lines = [f"{frame.filename.rpartition('/pretrain3d/')[2]}:{frame.lineno}" for frame in frames[:3]]
            cls.waits.append(f"{what} @ {' < '.join(lines)}")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if not here and asked != "sim":
        return func(*args, **kwargs)
    to_device = asked == "sim" if asked is not None else True
    if func in (aten._to_copy.default, aten.copy_.default):
        _note_copy(func, args, kwargs, asked)
    elif func in INDEXING:
        _note_index(func, args)
    elif func in READS_VALUES or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        Watch.note(str(func))
    elif here and asked is None:
        strangers = [t for t in tensors if not isinstance(t, OnDevice)]
        if any(t.dim() > 0 or torch.Tag.pointwise not in func.tags for t in strangers):
            raise RuntimeError(f"{func} mixes devices: {[(str(t.device), tuple(t.shape)) for t in tensors]}")
    host_args, host_kwargs = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if "device" in host_kwargs:
        host_kwargs = {**host_kwargs, "device": torch.device("cpu"), "pin_memory": False}
    result = _on_host(func, host_args, host_kwargs)
    if to_device:
        result = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if here and to_device else result


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The CPU lacks some operations in bf16 that GPUs have: they are done in float32 and rounded.

    Convolutions, too: where an axis is shorter than the kernel, parts of the kernel's gradient are whatever the memory
    held (`backbones.convolution`, which leaves other devices than the CPU alone), and a CPU without bf16 is slow.
    """

    def change(found: torch.dtype, wanted: torch.dtype, values: Any) -> Any:
        return tree_map(lambda v: v.to(wanted) if isinstance(v, Tensor) and v.dtype == found else v, values)

    rounded = any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in tree_leaves(args))
    if not (rounded and func in (aten.convolution.default, aten.convolution_backward.default)):
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            if "not implemented for 'BFloat16'" not in str(error):
                raise
    args, kwargs = change(torch.bfloat16, torch.float32, (args, kwargs))
    return change(torch.float32, torch.bfloat16, func(*args, **kwargs))


def _note_copy(func: Any, args: Any, kwargs: dict[str, Any], asked: str | None) -> None:
    if func is aten.copy_.default:
        source, target, free = args[1].device.type, args[0].device.type, any(args[2:]) or kwargs.get("non_blocking")
    else:
        source, target, free = args[0].device.type, asked or args[0].device.type, kwargs.get("non_blocking")
    if source == target:
        return
    if not free:
        Watch.note(f"copy from {source} to {target}")
    tensor = args[1] if func is aten.copy_.default else args[0]
    pageable = source == "cpu" and not getattr(tensor, "pinned", False) and tensor.nbytes > PAGEABLE
    if free and pageable and not _of_lightning():
        Watch.note(f"copy of {tensor.nbytes} bytes that are not pinned")


def _of_lightning() -> bool:
    """Whether Lightning copies: batches, which a loader has pinned where there is a GPU."""
    files = [frame.filename for frame in traceback.extract_stack()[::-1]]
    return "/lightning/" in next((file for file in files if "/lightning/" in file or "/pretrain3d/" in file), "")


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _note_index(func: Any, args: Any) -> None:
    for index in args[1]:
        if index is None:
            continue
        one_value = func is not aten.index.Tensor and args[2].numel() == 1  # is done by masked_fill
        if index.dtype in (torch.bool, torch.uint8) and not one_value:
            Watch.note(f"{func} by a mask")
        elif not isinstance(index, OnDevice):
            Watch.note(f"{func} by an index on the host")


def _of_host(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != "sim":
            return real(data, *args, **({} if device is None else {"device": device}), **kwargs)
        if isinstance(data, OnDevice):
            return data
        Watch.note(f"torch.{real.__name__} on the device")
        return OnDevice(real(data, *args, **kwargs))

    return made


_HostGenerator = torch.Generator


class _DeviceGenerator(_HostGenerator):
    @property
    def device(self) -> torch.device:
        return torch.device("sim:0")


def _generator(device: Any = "cpu") -> torch.Generator:
    return _HostGenerator() if torch.device(device).type == "cpu" else _DeviceGenerator()


class SimulatedAccelerator(Accelerator):
    """What Lightning asks of one."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("sim:0")]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "sim"


class _Watching(Callback):
    """Everything from the end of the first steps, also of a resumed run, to the first validation or the end of
    training: batches, steps, callbacks, loggers."""

    start = 0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.start = trainer.global_step

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        Watch.on = trainer.global_step - self.start >= WARM

    def on_train_end(self, *_: Any) -> None:
        Watch.on = False

    def on_validation_start(self, *_: Any) -> None:
        Watch.on = False

    def on_exception(self, *_: Any) -> None:
        Watch.on = False


def _unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with Watch.during(False):
            return function(*args, **kwargs)

    return called


def _alone(device: torch.device, precision: Any) -> dict[str, Any]:
    strategy = SingleDeviceStrategy(device)
    return {"accelerator": SimulatedAccelerator(), "strategy": strategy, "devices": 1, "plugins": precision}


Placing = Callable[[torch.device, Any], dict[str, Any]]  # device and precision plugin -> arguments of a trainer


def _train_on(device: torch.device, placing: Placing) -> None:
    """Every trainer trains on the device from now on, and is watched; what predicts is loaded there."""
    from pretrain3d import api
    from pretrain3d.modules import checkpoint
    from pretrain3d.modules.pending import PendingLoss
    from pretrain3d.reporting.callbacks import Progress

    trainer = lightning.Trainer

    def train(**kwargs: Any) -> lightning.Trainer:
        placed = placing(device, MixedPrecision("bf16-mixed", device="sim"))
        callbacks = [*kwargs["callbacks"], _Watching()]
        return trainer(**{**kwargs, "precision": None, "callbacks": callbacks, **placed})

    train.__signature__ = inspect.signature(trainer)  # type: ignore[attr-defined]  # of what a config may say
    lightning.Trainer = train  # type: ignore[misc, assignment]
    load = checkpoint.load_module

    def load_module(path: Path, kind: str, *where: Any) -> Any:
        return load(path, kind, *([device] if where else []))

    checkpoint.load_module = api.load_module = load_module
    PendingLoss.values = _unwatched(PendingLoss.values)  # type: ignore[method-assign]  # a copy that was made a step ago
    Progress.get_metrics = _unwatched(Progress.get_metrics)  # type: ignore[method-assign]  # twenty times in a run


def main(lines: list[list[str]], placing: Placing = _alone) -> None:
    """Runs command lines on the device."""
    from pretrain3d.__main__ import main as pretrain3d

    _train_on(register(), placing)
    results = []
    for line in lines:
        Watch.waits = []
        with Simulation():
            status = pretrain3d(line)
        results.append({"status": status, "waits": sorted(set(Watch.waits))})
    print(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
