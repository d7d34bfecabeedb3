"""Manifests: what a conversion was made from and how, as JSON beside the weights."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from modeling_looped.families import family_of
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.slots import SlotLayout
from modeling_looped.state_map import Drop, New, Rename
from modeling_looped.version import __version__

PACKAGES = ("gguf", "huggingface_hub", "safetensors", "tokenizers", "torch", "transformers")


def retrofit_manifest(teacher: PreTrainedModel, looped: LoopedForCausalLM) -> dict[str, Any]:
    """What two models and this machine say about a retrofit."""
    config = looped.config
    return {
        "made_by": "modeling_looped.conversion.retrofit",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "teacher": {
            "model_type": teacher.config.model_type,
            "layers": teacher.config.num_hidden_layers,
            "parameters": teacher.num_parameters(),
            "dtype": str(teacher.dtype).removeprefix("torch."),
        },
        "prelude": config.num_prelude_layers,
        "core": config.num_core_layers,
        "coda": config.num_coda_layers,
        "loops": config.num_loops,
        "loop_update": config.loop_update,
        "loop_adapter": config.loop_adapter,
        "trained_loops": 1,
        "layers": layer_map(config.slot_layout()),
        "weights": weight_map(teacher),
    }


def manifest_json(manifest: dict[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line each."""
    text = json.dumps(manifest, indent=2)
    return re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def layer_map(layout: SlotLayout) -> list[dict[str, Any]]:
    """For each layer of the teacher (stored under the same number): its part, and the slots in which it runs."""
    slots: list[list[int]] = [[] for _ in range(layout.stored_layers)]
    for slot in range(layout.num_slots):
        slots[layout.layer_and_loop(slot)[0]].append(slot)
    parts = zip(("prelude", "core", "coda"), layout.stored_ranges(), strict=True)
    return [
        {"teacher_layer": layer, "part": part, "slots": slots[layer]} for part, layers in parts for layer in layers
    ]


def weight_map(source: PreTrainedModel) -> dict[str, Any]:
    """What became of the teacher's weights: the rules of its family that are not plain copies."""
    rules = family_of(source.config).state_map(tied=source.config.tie_word_embeddings).rules
    return {
        "renamed": {
            rule.source: rule.target for rule in rules if isinstance(rule, Rename) and rule.source != rule.target
        },
        "dropped": {rule.source: rule.because for rule in rules if isinstance(rule, Drop)},
        "new": {rule.target: rule.because for rule in rules if isinstance(rule, New)},
        "all others": "copied under the same name",
    }


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version(), "modeling_looped": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


__all__ = ["layer_map", "manifest_json", "retrofit_manifest", "versions", "weight_map"]
