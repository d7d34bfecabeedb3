"""What `import modeling_looped` gives, what it registers, and what it leaves alone."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import modeling_looped

PUBLIC_NAMES = [
    "LoopedConfig",
    "LoopedForCausalLM",
    "LoopedForMaskedLM",
    "LoopedForQuestionAnswering",
    "LoopedForSequenceClassification",
    "LoopedForTokenClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
    "SlotLayout",
    "__version__",
]

AUTO_CLASSES = {
    "AutoModel": "LoopedModel",
    "AutoModelForCausalLM": "LoopedForCausalLM",
    "AutoModelForMaskedLM": "LoopedForMaskedLM",
    "AutoModelForQuestionAnswering": "LoopedForQuestionAnswering",
    "AutoModelForSequenceClassification": "LoopedForSequenceClassification",
    "AutoModelForTokenClassification": "LoopedForTokenClassification",
}

#: Run where nothing but Transformers has been imported: what the import registers, and which modules it brings in.
FRESH_IMPORT = """
import json, sys, warnings
import transformers, transformers.modeling_layers, transformers.generation
before = set(sys.modules)
warnings.simplefilter("error")
import modeling_looped
registered = {}
for name in %r:
    mapping = getattr(transformers, name)._model_mapping
    registered[name] = mapping[modeling_looped.LoopedConfig].__name__
config = transformers.AutoConfig.for_model("looped")
print(json.dumps({
    "registered": registered,
    "config": type(config).__name__,
    "modules": sorted(set(sys.modules) - before),
}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    command = [sys.executable, "-c", FRESH_IMPORT % list(AUTO_CLASSES)]
    root = Path(modeling_looped.__file__).parents[1]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout), process.stderr


def test_public_names_are_these():
    assert modeling_looped.__all__ == PUBLIC_NAMES
    assert all(hasattr(modeling_looped, name) for name in PUBLIC_NAMES)


@pytest.mark.parametrize("name", [name for name in PUBLIC_NAMES if name != "__version__"])
def test_public_names_and_what_can_be_called_on_them_are_documented(name):
    """An override is documented by what it overrides; validators by the message they raise."""
    public = getattr(modeling_looped, name)
    assert (public.__doc__ or "").strip()
    undocumented = [
        method
        for method, function in vars(public).items()
        if inspect.isfunction(function) and not method.startswith(("_", "validate_")) and not inspect.getdoc(function)
    ]
    assert not undocumented


@pytest.mark.slow
def test_importing_registers_every_auto_class(fresh_import):
    seen, _ = fresh_import
    assert seen["registered"] == AUTO_CLASSES
    assert seen["config"] == "LoopedConfig"


@pytest.mark.slow
@pytest.mark.parametrize(
    "package",
    ["peft", "trl", "datasets", "lm_eval", "gguf", "optimum", "matplotlib", "jinja2", "modeling_looped.conversion"],
)
def test_importing_leaves_alone_what_only_some_users_need(fresh_import, package):
    modules = [name for name in fresh_import[0]["modules"] if name == package or name.startswith(f"{package}.")]
    assert not modules


@pytest.mark.slow
def test_importing_prints_nothing(fresh_import):
    assert not fresh_import[1]


def test_auto_classes_build_what_they_register():
    config = transformers.AutoConfig.for_model("looped", num_core_layers=1, hidden_size=24, vocab_size=7)
    for auto_class, name in AUTO_CLASSES.items():
        config.is_causal = name != "LoopedForMaskedLM"
        assert type(getattr(transformers, auto_class).from_config(config)) is getattr(modeling_looped, name)


def test_rotary_embedding_has_the_layout_that_engines_know_from_llama():
    config = modeling_looped.LoopedConfig(hidden_size=24, num_attention_heads=4, head_dim=6, vocab_size=7)
    cos, sin = modeling_looped.LoopedModel(config).rotary_emb(torch.zeros(2, 5, 24), torch.arange(5).unsqueeze(0))
    assert cos.shape == sin.shape == (1, 5, 6)
