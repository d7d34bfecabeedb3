"""Model cards of looped models, from a conversion's manifest and a report's figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.layer_plan import written
from modeling_looped.version import __version__

from .costs import Costs, costs_table, markdown_table
from .layer_map import LayerMap

TEMPLATE = Path(__file__).with_name("card_template.md")
#: What the Hub knows a model may be to its base model.
RELATIONS = ("finetune", "adapter", "merge", "quantized")
TAGS = ("looped", "recurrent-depth", "weight-sharing", "custom_code")


class CardFields(NamedTuple):
    """What a card says that no file knows.

    Attributes:
        license: the Hub's word for it, such as `apache-2.0`; `other` with `license_name` and `license_link`.
        repo_id: where the model is or will be: Hub id or folder, for the example.
        base_model: Hub id of the teacher; `None`: it is not on the Hub.
        relation: to the base model, one of `RELATIONS`.
        language: ISO 639 codes.
        datasets: Hub ids of training data.
        trained_loops: range of loop counts that training used, such as `1-4`; `None`: as the files say.
        summary, limits: text; `None`: what the files say.
        prompt: of the example.
        license_name, license_link: of a licence that the Hub does not know.
    """

    license: str
    repo_id: str
    base_model: str | None = None
    relation: str = "finetune"
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    trained_loops: str | None = None
    summary: str | None = None
    limits: str | None = None
    prompt: str = "A plant needs"
    license_name: str | None = None
    license_link: str | None = None


def model_card(
    config: LoopedConfig,
    figures: Mapping[str, Any],
    fields: CardFields,
    *,
    manifest: Mapping[str, Any] | None = None,
    layers: LayerMap | None = None,
) -> ModelCard:
    """The card of a looped model.

    Args:
        config: of the model.
        figures: what `report.json` holds.
        fields: what only a person knows.
        manifest, layers: of the conversion that made the model; `None`: it was trained from scratch, if it has neither
            a base model nor a teacher.

    Raises:
        ValueError: for metadata that the Hub would refuse, as far as that can be told without it.
    """
    check_fields(fields)
    data = card_data(figures, fields)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=figures["name"],
        summary=fields.summary or summary(config, fields),
        lineage=lineage(fields, manifest, has_teacher(figures.get("run"))),
        layer_map="" if layers is None else layer_map_table(layers, config),
        loops=loops_text(config, fields, manifest),
        repo_id=fields.repo_id,
        prompt=fields.prompt,
        num_loops=config.num_loops,
        context=figures["context"],
        dtype=figures["machine"]["dtype"],
        costs=costs_table(Costs(**row) for row in figures["costs"]),
        results=results(figures),
        training=training(figures.get("run")),
        limits=fields.limits or limits(config, figures),
        licence=licence(fields),
        version=__version__,
    )
    check_round_trip(card, data)
    return card


def card_data(figures: Mapping[str, Any], fields: CardFields) -> ModelCardData:
    """The metadata at the head of a card, with a result for each text and loop count in its `model-index`."""
    evaluations = [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
            dataset_name=name,
            metric_type="perplexity",
            metric_name=f"perplexity at num_loops={loops}",
            metric_value=round(math.exp(loss), 4),
            metric_args={"num_loops": int(loops)},
        )
        for name, by_loops in figures["losses"].items()
        for loops, loss in by_loops.items()
    ]
    optional = {
        "base_model": fields.base_model,
        "base_model_relation": fields.relation if fields.base_model else None,
        "language": list(fields.language) or None,
        "datasets": list(fields.datasets) or None,
        "license_name": fields.license_name,
        "license_link": fields.license_link,
    }
    return ModelCardData(
        model_name=figures["name"],
        license=fields.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        eval_results=evaluations,
        **{key: value for key, value in optional.items() if value is not None},
    )


def check_fields(fields: CardFields) -> None:
    """Raise ValueError for metadata that the Hub refuses; names the field and what is allowed."""
    if fields.relation not in RELATIONS:
        raise ValueError(f"relation={fields.relation!r} must be one of: {', '.join(RELATIONS)}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", fields.license):
        raise ValueError(f"license={fields.license!r} must be the Hub's word for one, such as apache-2.0 or other.")
    if (fields.license == "other") != bool(fields.license_name and fields.license_link):
        raise ValueError("license_name and license_link go with license='other', and it with them.")
    for code in fields.language:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", code):
            raise ValueError(f"language={code!r} must be an ISO 639 code of two or three letters, such as en.")
    for name, ids in (("base_model", (fields.base_model,)), ("datasets", fields.datasets)):
        for repo_id in filter(None, ids):
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"{name}={repo_id!r} must be an id on the Hub: {error}") from error


def check_round_trip(card: ModelCard, data: ModelCardData) -> None:
    """Raise ValueError unless the card's text reads back as the metadata that it was made from."""
    read = ModelCard(str(card)).data.to_dict()
    if read != data.to_dict():
        changed = sorted(key for key in {*read, *data.to_dict()} if read.get(key) != data.to_dict().get(key))
        raise ValueError(f"the card's metadata do not survive YAML: {', '.join(changed)}.")


def summary(config: LoopedConfig, fields: CardFields) -> str:
    """One paragraph: what it is."""
    made = f" made from [{fields.base_model}](https://huggingface.co/{fields.base_model})" if fields.base_model else ""
    return (
        f"A looped language model{made}: {config.num_prelude_layers} prelude layers, {config.num_core_layers} core "
        f"layers that run `num_loops` times ({config.num_loops} by default) and {config.num_coda_layers} coda layers."
    )


def has_teacher(run: Mapping[str, Any] | None) -> bool:
    """Whether a run was a distillation."""
    return bool(((run or {}).get("settings") or {}).get("teacher"))


def lineage(fields: CardFields, manifest: Mapping[str, Any] | None, distilled: bool) -> str:
    """Where the weights come from."""
    if manifest is None and (distilled or fields.base_model):
        return "How the weights that training began with were made was not recorded."
    if manifest is None:
        return "Trained from scratch: no other model's weights are in it."
    source = manifest.get("source") or {}
    base = fields.base_model and f"[{fields.base_model}](https://huggingface.co/{fields.base_model})"
    said = {
        "made by": manifest.get("made_by"),
        "date": manifest.get("date"),
        "base model": base,
        "revision": source.get("revision"),
        "unpacked from": source.get("gguf_file"),
        **{f"SHA-256 of {name}": value for name, value in source.get("sha256", {}).items()},
        "command": manifest.get("command"),
    }
    plain = ("date", "base model")
    rows = [(what, value if what in plain else f"`{value}`") for what, value in said.items() if value]
    return markdown_table(("", ""), rows)


def layer_map_table(layers: LayerMap, config: LoopedConfig) -> str:
    """Which teacher layers the stored ones stand for."""
    rows = []
    for part, stored in zip(("prelude", "core", "coda"), config.slot_layout().stored_ranges(), strict=True):
        if not stored:
            continue
        groups = [layers.teacher_layers[layer] for layer in stored]
        runs = config.slot_layout().loops_of(stored[0])
        if all(len(set(group)) == 1 for group in groups):
            rows.append((part, written(stored), written([group[0] for group in groups]), runs))
            continue
        for layer, group in zip(stored, groups, strict=True):
            rows.append(
                (part, layer, ", ".join(f"{teacher} in loop {t + 1}" for t, teacher in enumerate(group)), runs)
            )
    header = ("part", "stored layers", "teacher layers", f"runs at {config.num_loops} loops")
    dropped = f"\n\nTeacher layers that nothing stands for: {written(layers.dropped)}." if layers.dropped else ""
    return markdown_table(header, rows) + dropped


def loops_text(config: LoopedConfig, fields: CardFields, manifest: Mapping[str, Any] | None) -> str:
    """The default loop count, and which were trained."""
    trained = fields.trained_loops or (manifest or {}).get("trained_loops")
    if config.max_trained_loops is not None and fields.trained_loops is None:
        trained = f"up to {config.max_trained_loops}"
    known = f"Trained loop counts: {trained}." if trained else "Which loop counts were trained was not recorded."
    return f"Default: `num_loops={config.num_loops}`. {known}"


def results(figures: Mapping[str, Any]) -> str:
    """Losses by text and loop count."""
    counts = list(next(iter(figures["losses"].values())))
    teacher = figures.get("teacher_losses") or {}
    header = ["text", "tokens", *(f"num_loops={count}" for count in counts), *(["base model"] if teacher else [])]
    rows = [
        [
            name,
            figures["tokens"][name],
            *(f"{by_loops[count]:.3f}" for count in counts),
            *([f"{teacher[name]:.3f}"] if teacher else []),
        ]
        for name, by_loops in figures["losses"].items()
    ]
    command = figures.get("command")
    measured = f"\n\nMeasured {figures['machine']['date']} in {figures['machine']['dtype']}"
    return (
        "Nats per token of text that was not trained on; the metadata above have them as perplexities.\n\n"
        + markdown_table(header, rows)
        + measured
        + (f":\n\n```bash\n{command}\n```" if command else ".")
    )


def training(run: Mapping[str, Any] | None) -> str:
    """The recipe of the run."""
    if run is None:
        return "None: the weights are those of the conversion."
    last = ", ".join(f"{name} {curve['y'][-1]:.3f}" for name, curve in run["curves"].items() if curve["y"])
    tokens = max((x for curve in run["curves"].values() for x in curve["x"]), default=0)
    objective = " (of training: what the distillation minimised)" if has_teacher(run) else ""
    text = f"{run['steps']} optimiser steps, {tokens:,.0f} {run['axis']}; "
    text += f"last losses in nats per token{objective}: {last}."
    settings = dict(run["settings"] or {})
    if isinstance(settings.get("student"), dict):
        settings["student"] = {name: value for name, value in settings["student"].items() if name != "config"}
    if settings:  # without the config, which lies beside the card
        text += "\n\n```json\n" + json.dumps(settings, indent=2) + "\n```"
    return text


def limits(config: LoopedConfig, figures: Mapping[str, Any]) -> str:
    """What a user should not expect."""
    texts: Sequence[str] = list(figures["losses"])
    lines = [
        "- What the base model cannot do, or does wrong, this one does too: looping brings no knowledge.",
        f"- Measured were losses on {', '.join(texts)} and nothing else: no task, no safety.",
        "- More loops cost FLOPs and, unless keys and values are shared, cache, in proportion to the layers run.",
    ]
    counts = sorted(int(count) for count in figures["losses"][texts[0]])
    lines.append(f"- Loop counts other than {', '.join(map(str, counts))} were not measured.")
    if figures.get("run") is None and config.loop_update["type"] == "damped":
        lines.append("- Nothing was trained at more than one loop: the damped update keeps more loops near the first.")
    return "\n".join(lines)


def licence(fields: CardFields) -> str:
    """The licence in words."""
    if fields.license == "other":
        return f"[{fields.license_name}]({fields.license_link})"
    return f"`{fields.license}`."


__all__ = ["RELATIONS", "TEMPLATE", "CardFields", "card_data", "model_card"]
