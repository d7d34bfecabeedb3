"""Memory: what a looped model needs for inference and for a training step, without allocating any of it.

B batch, S tokens, T loops. The step runs on the meta device, whose tensors have shapes and no numbers, and every
storage is counted from the operation that makes it until it is freed. So checkpointing, truncated backpropagation and
what each strategy keeps are counted as they are. What an estimate cannot know is the allocator's own loss, and the
scratch memory inside of kernels.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.accounting import (
    checked_length,
    kv_cache_bytes,
    looped_config,
    meta_inputs,
    replace_attention,
    skeleton,
)
from modeling_looped.halting import HALTINGS
from modeling_looped.slots import checked_num_loops

#: Values of `checkpointing`: what is recomputed at a time in the backward.
CHECKPOINTING = ("none", "layer", "loop")
#: Optimiser -> numbers that it keeps per trained parameter.
OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adamw": 2}


class InferenceMemory(NamedTuple):
    """Bytes of a forward without gradients over a whole prompt.

    Attributes:
        weights: parameters and buffers.
        key_values: of the prompt, in a dynamic cache.
        activations: most that intermediate results take at a time, the logits included.
    """

    weights: int
    key_values: int
    activations: int

    @property
    def total(self) -> int:
        """The three together."""
        return sum(self)


class TrainingMemory(NamedTuple):
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters that are trained.
        optimizer: what the optimiser keeps.
        activations: what the forward leaves for the backward, the logits included.
        peak: most that gradients and intermediate results take at a time, beside weights and optimiser.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    @property
    def total(self) -> int:
        """Most that the step takes."""
        return self.weights + self.optimizer + max(self.peak, self.gradients)


def inference_memory(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    sequence_length: int,
    num_loops: int | None = None,
    dtype: torch.dtype | None = None,
) -> InferenceMemory:
    """Memory of reading a prompt of S tokens, with a cache if the model has one.

    Args:
        model: any looped model; only its class, config and dtype are read, so the meta device will do.
        batch_size, sequence_length: B and S.
        num_loops: T; `None`: the config's.
        dtype: of weights, cache and activations; `None`: the model's.

    Raises:
        ValueError: for a count that is not an integer of at least 1.
    """
    probe, inputs, loops = prepared(model, batch_size, sequence_length, num_loops, dtype)
    with torch.no_grad(), LiveBytes(probe) as live:
        probe.eval()(**inputs, num_loops=loops)
    cache = 0
    if looped_config(model).is_causal:
        cache = kv_cache_bytes(
            looped_config(model), sequence_length, num_loops=loops, batch_size=batch_size, dtype=probe.dtype
        )
    return InferenceMemory(bytes_of(probe), cache, live.peak)


def training_memory(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    sequence_length: int,
    num_loops: int | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: str = "none",
    optimizer: str = "adamw",
) -> TrainingMemory:
    """Memory of a training step: forward with the model's own loss, backward, and the optimiser's state.

    Truncated backpropagation is as the model's config has it (`backprop_loops`).

    Args:
        model, batch_size, sequence_length, num_loops: as in `inference_memory`.
        dtype: of weights, gradients, optimiser and activations; `None`: the model's.
        checkpointing: what is recomputed at a time: `none`, each `layer`, or each `loop` of the core (and each layer
            beside it).
        optimizer: `sgd`, `momentum` or `adamw`, whose state has the dtype of the weights.

    Raises:
        ValueError: for an option that does not exist, and for a count that is not an integer of at least 1.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing={checkpointing!r} must be one of: {', '.join(CHECKPOINTING)}.")
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer={optimizer!r} must be one of: {', '.join(OPTIMIZER_STATES)}.")
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"{type(model).__name__} has no loss of labels, and so no training step to estimate.")
    probe, inputs, loops = prepared(model, batch_size, sequence_length, num_loops, dtype)
    probe.train()
    if checkpointing != "none":
        looped_config(probe).checkpoint_granularity = checkpointing
        probe.activation_checkpointing_enable()
    trained = sum(parameter.nbytes for parameter in probe.parameters() if parameter.requires_grad)
    with LiveBytes(probe) as live:
        output = probe(**inputs, labels=inputs["input_ids"], num_loops=loops)
        held = live.now
        output.loss.backward()
    return TrainingMemory(bytes_of(probe), trained, OPTIMIZER_STATES[optimizer] * trained, held, live.peak)


def prepared(
    model: PreTrainedModel, batch_size: int, sequence_length: int, num_loops: int | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any], int]:
    """The model on the meta device, the inputs of a forward there, and the checked loop count."""
    batch, length = checked_length(batch_size, "batch_size"), checked_length(sequence_length)
    config = copy.deepcopy(looped_config(model))
    loops = config.num_loops if num_loops is None else checked_num_loops(num_loops)
    eager = config._attn_implementation == "eager"
    probe: Any = skeleton(type(model), config)
    probe = probe.to(dtype=dtype or model.dtype)
    if not eager:
        replace_attention(probe, fused_attention)
    inputs = meta_inputs(batch, length)
    if not eager and not HALTINGS[config.halting["type"]].routes:
        # fused kernels need no mask for causality, which alone is left where nothing is padded
        types = {config.stored_layer_type(layer) for layer in range(config.num_stored_layers)}
        inputs |= {
            "attention_mask": dict.fromkeys(types),
            "position_ids": torch.arange(length, device="meta").unsqueeze(0),
        }
    return probe, inputs, loops


class FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel: it keeps its inputs, its output and a sum per query, no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, S, K] and [B, Hkv, S, K] -> an output of the shape [B, S, H, K]."""
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        """Gradients of the shapes of the inputs."""
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
    """`FusedAttention` in the place of a slot."""
    output: Any = FusedAttention.apply(query, key, value)
    return output, None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and nothing has freed yet; those of `model` do not count.

    Attributes:
        now: bytes at this moment.
        peak: most so far.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, and subtract it when it is freed."""
        if storage in self.seen:
            return
        self.seen[storage] = Counted(self, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)


class Counted:
    """A counted storage's size; goes when the storage goes, and takes its bytes off the count."""

    def __init__(self, live: LiveBytes, size: int):
        self.live, self.size = live, size

    def __del__(self) -> None:
        self.live.now -= self.size


def bytes_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


__all__ = [
    "CHECKPOINTING",
    "OPTIMIZER_STATES",
    "InferenceMemory",
    "TrainingMemory",
    "inference_memory",
    "training_memory",
]
