"""Importing: a published checkpoint becomes a folder that loads as a looped model, and can be turned back."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.depth_sampling import STEP

from .checkpoint import Steps
from .companions import CODE_FILES, GENERATION_CONFIG, bring_companions, code_named, copy_files
from .manifest import manifest_json, versions
from .output_folder import MANIFEST, check_output, staged
from .parity import (
    PARITY_TOLERANCE,
    Parity,
    check_recording,
    compare_with_recording,
    read_recording,
    refuse_disparity,
)
from .published import PublishedFamily, SourceConfig, published_family
from .shard_writer import ShardWriter
from .stored_tensors import PLAIN_DTYPES, StoredTensors
from .teacher import find_teacher, sha256
from .tensor_map import TensorMap

#: Folder inside the result with what belongs to the original and not to our model: its code, which must not lie among
#: ours, and, in the file ASIDE, the published tensors that our model does not hold. Those must not lie beside the
#: weights, where an engine that reads every safetensors file would take them for weights.
ORIGINAL = Path("original")
ASIDE = ORIGINAL / "unread.safetensors"


def import_checkpoint(
    source: str,
    output: Path,
    *,
    family: str = "auto",
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    recording: Path | None = None,
    tolerance: float = PARITY_TOLERANCE,
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Convert the published checkpoint `source` and write the looped one to `output`.

    Names, shapes and types are checked before a tensor is read. The weights then pass through one shard at a time.

    Args:
        source: folder or Hub id.
        output: folder to write; must not exist or be empty, unless `overwrite`.
        family: name of the family, or `auto`.
        revision: branch, tag or commit of a source on the Hub.
        settings: fields to add to the source's config, for what it should say and does not.
        dtype: of the weights; `None`: as they are.
        max_shard_bytes: largest size of a file of weights.
        recording: safetensors file of inputs and outputs of the original, to compare with before anything is written.
        tolerance: largest difference from it that counts as equal.
        overwrite: whether the result of an earlier conversion in `output` may be replaced.
        command: the command line, for the manifest.
        report: is called with each line of progress.

    Returns:
        the manifest.

    Raises:
        ValueError: for a checkpoint that cannot be expressed, or whose tensors are not its config's; names what.
        ConversionError: if the result is not what the original was; `output` is left as it was.
    """
    step = Steps(report)
    check_output(output, overwrite=overwrite)
    expected = None if recording is None else read_recording(recording)
    step(f"looking up {source}")
    files = find_teacher(source, revision=revision, field="source", further=CODE_FILES)
    config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    stored = StoredTensors(files.folder)

    step("matching its config and its tensors with ours")
    told = {**config, **(settings or {})}
    chosen, looped, tensor_map = plan_import(family, told, stored)
    model_class = chosen.model_class_for(told)
    looped.dtype = dtype or widest_dtype(stored)
    looped.architectures = [model_class.__name__]
    report(f"   {chosen.name}: {len(stored.shapes)} tensors")
    if expected is not None:
        check_recording(expected, model_class, looped)

    with staged(output) as folder:
        step("writing the weights")
        writer = ShardWriter(folder, max_shard_bytes, report)
        for name, tensor in tensor_map.to_ours(stored.read, stored.shapes):
            writer.add(name, tensor if dtype is None else tensor.to(dtype))
        writer.finish()
        aside = keep_aside(stored, tensor_map, folder)
        code = keep_code(files.folder, config, folder)
        looped.save_pretrained(folder)
        repairs = bring_companions(files.folder, folder, looped)
        for line in repairs:
            report(f"   {line}")
        step("loading the result")
        parity = verify(model_class, folder, expected)
        if parity is not None:
            for name, difference in parity.original.items():
                report(f"   {name}: largest difference from the original {difference:.2e}")
            refuse_disparity(parity, tolerance)
        manifest = {
            "made_by": "modeling_looped.conversion.importing",
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "source": files.provenance(),
            "family": chosen.name,
            "original": {
                "config": config,
                "settings": dict(settings or {}),
                "generation_config": read_json(files.folder / GENERATION_CONFIG),
                "weight_file": stored.weight_file,
                "index_metadata": stored.index_metadata,
                "files": stored.files,
                "code": code,
            },
            "looped": described(looped),
            "unread": aside,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "special_tokens": repairs,
            "checks": None if parity is None else {"tolerance": tolerance, **parity._asdict()},
            "sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        }
        (folder / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")
    step(f"saved to {output}")
    return manifest


def plan_import(
    name: str, config: Mapping[str, Any], stored: StoredTensors
) -> tuple[PublishedFamily, PreTrainedConfig, TensorMap]:
    """The family, our config and the map of a checkpoint, after every check that needs no tensor."""
    family = published_family(name, config, stored.shapes)
    source_config = SourceConfig(family.name, config)
    fields = family.fields(source_config, stored.shapes)
    source_config.finish()
    looped = family.config_of(fields)
    ours = our_shapes(family.model_class_for(config), looped)
    tensor_map = family.tensor_map(config, looped, ours, stored.shapes)
    tensor_map.check(stored.shapes, ours)
    packed = [name for name, dtype in stored.dtypes.items() if dtype not in PLAIN_DTYPES]
    packed = [name for name in packed if name not in tensor_map.unread]
    if packed:
        raise ValueError(f"these weights are not plain floating-point numbers (quantised?): {', '.join(packed[:20])}.")
    return family, looped, tensor_map


def our_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shape of every weight that a checkpoint of ours stores: all but those that are another one by another name."""
    with torch.device("meta"):
        model = model_class(config)
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys and not name.endswith(STEP)
    }


def keep_aside(stored: StoredTensors, tensor_map: TensorMap, folder: Path) -> dict[str, str]:
    """Write the published tensors that our model does not hold beside it, after checking those that can be.

    Returns:
        their names, with the reason.
    """
    unread: dict[str, Tensor] = {}
    for name in stored.shapes:
        if name in tensor_map.unread:
            unread[name] = stored.read(name).clone()
            tensor_map.check_unread(name, unread[name])
    if unread:
        (folder / ORIGINAL).mkdir()
        save_file(unread, folder / ASIDE, metadata={"format": "pt"})
    return {name: tensor_map.unread[name].because for name in unread}


def keep_code(source: Path, config: Mapping[str, Any], folder: Path) -> list[str]:
    """Copy the code that the original's config names, with all that it may import, for the way back; nothing runs it.

    Returns:
        names of the files; none where the config names no code, and what lies there is something else.
    """
    if not (code_named(config) and any(source.glob("*.py"))):
        return []
    (folder / ORIGINAL).mkdir(exist_ok=True)
    return copy_files(source, folder / ORIGINAL, CODE_FILES)


def verify(model_class: type[PreTrainedModel], folder: Path, recording: Mapping[str, Tensor] | None) -> Parity | None:
    """Load the folder as a user would: every weight must be there and no other. Then compare with the recording.

    Without one the model is loaded without its values, for which there may be no room.
    """
    load: Any = model_class.from_pretrained
    model, loading = load(folder, output_loading_info=True, device_map="meta" if recording is None else "cpu")
    wrong = {kind: keys for kind, keys in loading.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder} was just written and does not load as it should: {wrong}")
    return None if recording is None else compare_with_recording(model.float().eval(), recording)


def widest_dtype(stored: StoredTensors) -> torch.dtype:
    """The type that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for name, shape in stored.shapes.items():
        dtype = stored.dtypes[name]
        if dtype in PLAIN_DTYPES:
            sizes[dtype] = sizes.get(dtype, 0) + shape.numel()
    return max(sizes, key=sizes.__getitem__)


def described(config: PreTrainedConfig) -> dict[str, Any]:
    """What our config says of the function of the weights, for comparison at export."""
    unrelated = {"architectures", "auto_map", "dtype", "transformers_version", "use_cache", "id2label", "label2id"}
    # of training
    unrelated |= {"backprop_loops", "checkpoint_granularity", "depth_sampling", "loop_loss", "max_trained_loops"}
    unrelated |= {"weight_init", "output_projection_init"}  # of a start without weights
    unrelated |= {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "_name_or_path"}

    def related(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: related(value) if name in ("encoder", "decoder") else value
            for name, value in values.items()
            if name not in unrelated
        }

    return related(config.to_dict())


def read_json(path: Path) -> Any:
    """What a JSON file holds; `None` if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


__all__ = ["ASIDE", "ORIGINAL", "import_checkpoint", "our_shapes", "plan_import"]
