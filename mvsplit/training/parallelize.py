"""Parallelism, in one ordered function that the model knows nothing of.

Where every rank holds the network whole, nothing is done to it: the flat buffers of the optimiser
are what the ranks have in common (`mvsplit.training.replicas`). Else FSDP2 shards it. Blocks are
sharded in units of several: a collective per block would cost more in calls than in bytes at a
thousand layers. The units are gathered ahead in an order that is given, not found out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from mvsplit.diagnostics.ranks import is_distributed
from mvsplit.errors import UserError
from mvsplit.kernels.low_adamw import BLOCK
from mvsplit.models import Block, DiT
from mvsplit.training.config import ParallelConfig, TrainConfig
from mvsplit.training.distributed import world


def parallelize(model: DiT, config: TrainConfig, device: torch.device) -> None:
    """Lays `model` out for training, in place; its parameters keep their names.

    The order matters: what is sharded must be what runs. What is computed again is decided when the
    first batch shows its shape (`memory_plan`).

    Raises:
        UserError: the processes or bf16 weights cannot be divided as `train.parallel` says.
    """
    if config.bf16_weights:
        lower_weights(model)
    if shards(config):
        shard(model, config, _mesh(config.parallel, device))
    else:
        for block in cast(Iterable[Block], model.blocks):
            block.adds_gradients = device.type == "cuda"  # into the buffers of the optimiser


def shards(config: TrainConfig) -> bool:
    """Whether a run of this configuration divides its parameters over processes. `auto` does not:
    `mvsplit.training.layout` turns it into what fits."""
    return is_distributed() and config.parallel.layout == "shard"


def lower_weights(model: DiT) -> None:
    """Turns the matrices of the blocks, all but a few of the weights, into bf16."""
    for block in cast(Iterable[Block], model.blocks):
        for part in (block.attention, block.ffn):
            for matrix in part.children():
                if isinstance(matrix, nn.Linear):
                    matrix.weight.data = matrix.weight.data.bfloat16()


@contextmanager
def raised_weights(model: nn.Module) -> Iterator[None]:
    """Parameters in bf16 are fp32 within the block; the gradients that they get there are rounded
    into those that they had."""
    low = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    before = [(p.data, p.grad) for p in low]
    for parameter in low:
        parameter.grad = None
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, (values, grad) in zip(low, before, strict=True):
            found, parameter.grad = parameter.grad, None
            parameter.data = values
            parameter.grad = grad
            if grad is not None and found is not None:
                grad.copy_(found)


def shard(model: DiT, config: TrainConfig, mesh: Any) -> None:
    """Divides every parameter over the ranks of `mesh`, by rows. Of a network with bf16 weights
    only those, for a unit's are of one precision; what is left every rank holds whole.

    Raises:
        UserError: bf16 weights whose moments cannot be divided.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gathered as what the arithmetic runs in: autocast would keep a copy of every whole weight for
    # backward. Inputs stay as they are: the rotary tables are fp32.
    low = torch.bfloat16 if config.precision == "bf16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    whole = set()
    if config.weights == "bf16":
        _check_blocks(model, mesh.size() // config.parallel.replicas)
    if config.bf16_weights:
        whole = {p for p in model.parameters() if p.dtype != torch.bfloat16}
    units = _units(list(cast(Iterable[nn.Module], model.blocks)), config.parallel.unit)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
    for unit in units:
        fully_shard(unit, reshard_after_forward=config.parallel.reshard, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    # The velocity is a view, and nobody changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    heads = [cast(Any, unit[0]) for unit in units]  # what stands for a unit
    for i, head in enumerate(heads):
        ahead = config.parallel.prefetch
        head.set_modules_to_forward_prefetch(heads[i + 1 : i + 1 + ahead])
        head.set_modules_to_backward_prefetch(heads[max(0, i - ahead) : i][::-1])


def _check_blocks(model: DiT, shards: int) -> None:
    """Raises UserError where the rows of the matrices in bf16 cannot be divided together with the
    scales of their moments, of which there is one for `BLOCK` numbers of a row."""
    for name, parameter in model.named_parameters():
        rows, columns = parameter.shape if parameter.ndim == 2 else (0, 0)
        if parameter.dtype == torch.bfloat16 and (rows % shards or columns % BLOCK):
            raise UserError(
                f"train.weights='bf16' cannot be sharded over {shards} processes: {name} has "
                f"{rows} rows of {columns}, which have to be multiples of {shards} and {BLOCK}; "
                f"choose train.parallel.layout=replicate or weights=fp32"
            )


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded model sends its gradients to the ranks that hold
    them, or adds them up here until one does."""
    if hasattr(model, "set_requires_gradient_sync"):
        cast(Any, model).set_requires_gradient_sync(wanted)


def _units(blocks: Sequence[nn.Module], size: int) -> list[list[nn.Module]]:
    return [list(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def _mesh(config: ParallelConfig, device: torch.device) -> Any:
    """The ranks in a row, or in rows that hold the whole network each."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks, replicas = world(), config.replicas
    if ranks % replicas:
        raise UserError(
            f"train.parallel.replicas={replicas} does not divide the {ranks} processes of "
            f"torchrun; choose a divisor"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,))
    names = ("replica", "shard")
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=names)
