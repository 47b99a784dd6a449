"""How many floating-point operations a training step asks of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)  # torch's own count has the scores in it, which are computed once more


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch knows those of GPUs only
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


class ModelFlop(TorchDispatchMode):
    """Counts convolutions, products of matrices and attention: two for each multiplication with its addition.

    What the backward pass computes once more (activation checkpointing, the scores of fused attention) does not count,
    as in the usual definition of model-FLOP utilisation (Chowdhery et al. 2022, "PaLM", appendix B).

    Attributes:
        flop: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None and not _recomputes():
            self.flop += formula(*args, **kwargs, out_val=result)
        return result


def _recomputes() -> bool:
    """Whether this is a forward pass inside a backward pass: gradients are recorded in none but the former."""
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
