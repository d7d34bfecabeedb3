"""Text generation with a loop count that the caller chooses."""

# Transformers declares the `self` of its generation methods as a protocol, which neither `super()` nor a mixin fulfils
# for a type checker.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import os
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel

from .configuration_looped import LoopedConfig, refuse_foreign_loop_names
from .inputs import prefix_blocks, refuse_paged_cache
from .slots import checked_num_loops


class LoopedGenerationMixin(GenerationMixin):
    """`GenerationMixin` that knows one more generation parameter, `num_loops`.

    Precedence: `generate(num_loops=k)`, then a `GenerationConfig(num_loops=k)` given to `generate`, then the model's
    own generation config, then `config.num_loops`. Whichever wins sizes the cache and goes to every forward of the
    call.
    """

    config: LoopedConfig
    generation_config: GenerationConfig

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        refuse_foreign_loop_names(kwargs, "generate")
        num_loops = kwargs.pop("num_loops", None)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # Transformers keeps unknown entries of a generation config as attributes; forward must receive this one.
        refuse_foreign_loop_names(vars(prepared), "GenerationConfig")
        if num_loops is None:
            num_loops = getattr(prepared, "num_loops", None)
        if num_loops is not None:
            model_kwargs["num_loops"] = checked_num_loops(num_loops)
        types = model_kwargs.get("token_type_ids")
        if self.config.prefix_lm and types is not None:
            if prepared.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size={prepared.prefill_chunk_size} with token_type_ids and prefix_lm=True: a "
                    "chunk cannot see the rest of its prefix; leave one of them out."
                )
            model_kwargs.setdefault("prompt_length", types.shape[1])
        return prepared, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,  # named: `generate` looks whether it is
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers, which gives every new token the type of the last one before it: where types say what
        belongs to a prefix (`config.prefix_lm`), nothing behind the prompt does. N-gram embeddings are told which
        tokens came before, in the order that beams have now.
        """
        types = kwargs.get("token_type_ids")
        if prompt_length is not None and types is not None:
            kwargs["token_type_ids"] = torch.cat(
                (types[:, :prompt_length], torch.zeros_like(types[:, prompt_length:])), dim=1
            )
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        reach, current = self.base_model.ngram_embedding.context_length, inputs.get("input_ids")
        if reach and current is not None and current.shape[1] < input_ids.shape[1]:
            before = input_ids[:, : input_ids.shape[1] - current.shape[1]][:, -reach:]
            # always as many, for a compiled forward; a token's position says that those in front are none
            inputs["previous_input_ids"] = nn.functional.pad(before, (reach - before.shape[1], 0))
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        num_loops = model_kwargs.get("num_loops")
        if num_loops is None or num_loops == self.config.num_loops:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        # Caches are sized from `self.config`. A shallow copy of the model carries the other loop count there, so that
        # neither the user's config nor a call running in another thread sees it. Not by `copy.copy`, which would
        # construct a model that FSDP2 has sharded anew.
        sized = object.__new__(type(self))
        sized.__dict__.update(self.__dict__)
        sized.__dict__["config"] = self.config.with_num_loops(num_loops)  # its modules are this model's
        GenerationMixin._prepare_cache_for_generation(sized, generation_config, model_kwargs, *args, **kwargs)
        # What Transformers remembers to give the next static cache the same shape, and so spare a compilation.
        if "_previous_max_cache_length" in sized.__dict__:
            self._previous_max_cache_length = sized._previous_max_cache_length

    @staticmethod
    def create_masks_for_generate(
        config: LoopedConfig,
        *args: Any,
        token_type_ids: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers; the masks of the first step show a prefix to itself (`config.prefix_lm`)."""
        if is_first_iteration:
            kwargs |= prefix_blocks(config, token_type_ids)
        return create_masks_for_generate(config, *args, **kwargs)

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        model_kwargs: dict[str, Any],
        assistant_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.config.kv_sharing != "none" and generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} with kv_sharing="
                f"{self.config.kv_sharing!r}: a forward cannot stop after some slots, since a slot serves all loops "
                "of its layer. For a cheap drafter use assistant_model=model.with_num_loops(1)."
            )
        if assistant_model is not None:
            # The loop count is this model's: an assistant has its own, or is not looped and would refuse the argument.
            generation_config = without_num_loops(generation_config)
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "num_loops"}
        return super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        *args: Any,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers (continuous batching on a paged cache).

        Args:
            inputs: token ids of each prompt.
            generation_config: may hold `num_loops`.
            args: as in Transformers.
            num_loops: how often the core runs; goes before the generation config's.
            kwargs: as in Transformers.
        """
        refuse_foreign_loop_names(kwargs, "generate_batch")
        if num_loops is not None:
            generation_config = copy.copy(generation_config or self.generation_config)
            generation_config.num_loops = num_loops
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any):
        """As in Transformers; a `num_loops` in the generation config sizes the paged cache and goes to each step.

        Raises:
            ValueError: for a model that a paged cache cannot hold. Transformers would only log what goes wrong in its
                thread, and give empty answers.
        """
        refuse_paged_cache(self.config)
        num_loops = getattr(generation_config, "num_loops", None)
        if num_loops is None:
            num_loops = getattr(self.generation_config, "num_loops", None)
        if num_loops is None or checked_num_loops(num_loops) == self.config.num_loops:
            return super().init_continuous_batching(generation_config, *args, **kwargs)
        if generation_config is not None:
            generation_config = without_num_loops(generation_config)
        return self.with_num_loops(num_loops).init_continuous_batching(generation_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; a `num_loops` set on the generation config is found again when the folder is loaded."""
        if getattr(self.generation_config, "num_loops", None) is not None:
            # Transformers marks the generation config that it derived from the model's config, and reads only its own
            # parameters back from a file with that mark.
            self.generation_config._from_model_config = False
        return super().save_pretrained(save_directory, *args, **kwargs)

    def with_num_loops(self, num_loops: int) -> Self:
        """The same model at another default loop count: modules and configs of its own, all weights shared.

        Useful as a cheap drafter: `model.generate(..., assistant_model=model.with_num_loops(1))`.

        Args:
            num_loops: loop count of the returned model, at least 1.
        """
        num_loops = checked_num_loops(num_loops)
        memo: dict[int, Any] = {id(weight): weight for weight in (*self.parameters(), *self.buffers())}
        for name in LOOP_COUNT_STATE:
            if name in self.__dict__:
                memo[id(self.__dict__[name])] = None
        # Every module is copied and not only the outermost: the dispatchers read the attention implementation from the
        # config they hold, and hooks of accelerate are bound to the module they were put on.
        twin = copy.deepcopy(self, memo)
        for name in LOOP_COUNT_STATE:
            twin.__dict__.pop(name, None)
        twin.config.num_loops = num_loops
        twin.generation_config = without_num_loops(twin.generation_config)
        return twin


#: What Transformers keeps on a model between calls that holds for one loop count only.
LOOP_COUNT_STATE = ("_compiled_call", "_cached_continuous_batching_manager")


def without_num_loops(generation_config: GenerationConfig) -> GenerationConfig:
    """A copy that leaves the loop count to the model."""
    other = copy.copy(generation_config)
    other.__dict__.pop("num_loops", None)
    return other
