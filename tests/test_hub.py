"""Every way of saving writes a folder that loads alone, where only torch and transformers are installed.

The folders of all ways go to a fresh process that cannot import the package (`hub_load_alone.py`); what it saves goes
to a second one. Every model must compute what it computed in memory before the first save.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from hub_load_alone import TOKENS
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import configuration_utils, modeling_utils
from transformers.utils import hub as transformers_hub

from modeling_looped import (
    LoopedConfig,
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
    LoopedModel,
)
from modeling_looped.remote_code import AUTO_MAP, copy_code

PACKAGE = Path(sys.modules[LoopedConfig.__module__].__file__).parent
REPO_ID = "someone/looped"

HEADS = {
    "AutoModel": LoopedModel,
    "AutoModelForCausalLM": LoopedForCausalLM,
    "AutoModelForMaskedLM": LoopedForMaskedLM,
    "AutoModelForQuestionAnswering": LoopedForQuestionAnswering,
    "AutoModelForSequenceClassification": LoopedForSequenceClassification,
    "AutoModelForTokenClassification": LoopedForTokenClassification,
}
OTHER_CAUSAL_READERS = [name for name in HEADS if name not in ("AutoModelForCausalLM", "AutoModelForMaskedLM")]


def head(auto_class, **overrides):
    config = tiny_config(is_causal=auto_class != "AutoModelForMaskedLM", num_labels=3, **overrides)
    return randomise(HEADS[auto_class](config)).eval()


def save_plainly(make):
    def save(folder):
        model = make()
        model.save_pretrained(folder)
        return model

    return save


def save_with_tokenizer(folder):
    model = tiny_model()
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return model


def save_full_state(folder):
    """As FSDP hands it over: every tensor a copy, tied ones too."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(folder, state_dict={name: t.clone() for name, t in model.state_dict().items()})
    return model


def save_shards(folder):
    model = tiny_model()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def save_trainer_checkpoint(folder):
    model = tiny_model().train()
    arguments = transformers.TrainingArguments(
        str(folder.parent / "runs"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in random_tokens(8)]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    (folder.parent / "runs" / "checkpoint-1").rename(folder)
    return model.eval()


def save_merged_adapter(folder):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    merged = peft_model.merge_and_unload().eval()
    merged.save_pretrained(folder)
    return merged


@contextmanager
def uploads_to(root):
    """Let commits to the Hub arrive in `root`/1, `root`/2, ...: there is no network, so its client is replaced."""
    commits = count(1)

    def create_commit(*, operations, **kwargs):
        folder = root / str(next(commits))
        folder.mkdir(parents=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)

    def no_card(*args, **kwargs):
        raise LocalEntryNotFoundError("no card yet")

    client = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id=REPO_ID), create_commit=create_commit)
    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers_hub, modeling_utils, configuration_utils):
            patch.setattr(module, "hf_api", lambda: client)
        patch.setattr(transformers_hub.ModelCard, "load", no_card)
        yield


def push_to_hub(folder):
    model = tiny_model()
    with uploads_to(folder.parent / "uploads"):
        model.push_to_hub(REPO_ID)
    (folder.parent / "uploads" / "1").rename(folder)
    return model


def save_without_code(folder):
    """A checkpoint whose code lies in another repository, `REPO_ID`."""
    model = tiny_model()
    model.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {auto_class: f"{REPO_ID}--{target}" for auto_class, target in AUTO_MAP.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def save_config(folder):
    config = tiny_config()
    config.save_pretrained(folder)
    torch.manual_seed(0)
    return LoopedModel(config).eval()


#: Every variant carries all of the code; these run most of it.
OF_MANY_PARTS = ("norms", "lora", "halting_act", "huginn", "parcae_code", "shared", "sequence", "wide", "albert")

#: name -> (save, Auto classes that read the folder, its own head's last).
WAYS = {
    **{
        auto_class: (save_plainly(partial(head, auto_class)), ["AutoModel", auto_class])
        for auto_class in HEADS
        if auto_class not in ("AutoModel", "AutoModelForCausalLM")
    },
    "AutoModel": (save_plainly(partial(head, "AutoModel")), ["AutoModel"]),
    "AutoModelForCausalLM": (save_plainly(tiny_model), [*OTHER_CAUSAL_READERS, "AutoModelForCausalLM"]),
    "config_alone": (save_config, []),
    "with_tokenizer": (save_with_tokenizer, ["AutoModelForCausalLM"]),
    "full_state_dict": (save_full_state, ["AutoModelForCausalLM"]),
    "shards": (save_shards, ["AutoModelForCausalLM"]),
    "trainer_checkpoint": (save_trainer_checkpoint, ["AutoModelForCausalLM"]),
    "merged_adapter": (save_merged_adapter, ["AutoModelForCausalLM"]),
    "push_to_hub": (push_to_hub, ["AutoModelForCausalLM"]),
    "hub_repository": (save_plainly(tiny_model), ["AutoModelForCausalLM"]),
    "code_elsewhere": (save_without_code, ["AutoModelForCausalLM"]),
    **{
        f"variant_{name}": (save_plainly(partial(tiny_model, **overrides)), ["AutoModelForCausalLM"])
        for name, overrides in VARIANTS.items()
        if name in OF_MANY_PARTS
    },
}


def place_in_hub_cache(folder, cache):
    """Lay `folder` out as the Hub's client does after a download of `REPO_ID`."""
    commit = "0" * 40
    repository = cache / f"models--{REPO_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def load_alone(jobs, work):
    """Results of `hub_load_alone.py` on `jobs`, in a fresh process with a fresh copy of the code."""
    work.mkdir()
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("hub_load_alone.py")
    environment = os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_CACHE": str(work.parent / "hub")}
    command = [sys.executable, "-I", str(script), str(work / "jobs.json"), str(work / "results")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=work)
    assert process.returncode == 0, process.stderr[-4000:]
    return torch.load(work / "results")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by name, what their models computed before saving, and what they computed alone: once, and again."""
    root = tmp_path_factory.mktemp("hub")
    folders, expected = {}, {}
    for name, (save, _) in WAYS.items():
        folders[name] = root / "first" / name
        folders[name].parent.mkdir(exist_ok=True)
        model = save(folders[name])
        with torch.no_grad():
            expected[name] = {
                "hidden": model.base_model(TOKENS).last_hidden_state,
                "output": model(TOKENS)[0],
                "one_loop": model(TOKENS, num_loops=1)[0],
            }
            if model.can_generate():
                expected[name]["generated"] = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    place_in_hub_cache(folders["hub_repository"], root / "hub")

    again = {name: root / "second" / name for name in WAYS}
    jobs = [
        {"name": name, "folder": str(folders[name]), "auto_classes": readers, "again": str(again[name])}
        for name, (_, readers) in WAYS.items()
    ]
    first = load_alone(
        [job | {"folder": REPO_ID} if job["name"] == "hub_repository" else job for job in jobs], root / "a"
    )
    second_jobs = [
        job
        | {
            "folder": job["again"],
            "again": str(root / "third" / job["name"]),
            "auto_classes": job["auto_classes"][-1:],
        }
        for job in jobs
    ]
    second = load_alone(second_jobs, root / "b")
    return SimpleNamespace(folders=folders, again=again, expected=expected, first=first, second=second)


def assert_computes(seen, expected, *, own_head):
    assert torch.equal(seen["hidden"], expected["hidden"])
    if own_head:
        assert seen["missing_keys"] == []
        assert torch.equal(seen["output"], expected["output"])
        assert torch.equal(seen.get("one_loop", expected["one_loop"]), expected["one_loop"])
        assert seen.get("generated", torch.empty(0)).tolist() == expected.get("generated", torch.empty(0)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_folder_loads_alone_and_computes_the_same(saved, name):
    readers = WAYS[name][1] or ["AutoConfig"]
    seen = saved.first[name]
    assert seen.keys() - {"text"} == set(readers)
    for auto_class in readers:
        assert seen[auto_class]["module"].startswith("transformers_modules.")
        assert seen[auto_class]["config_module"].startswith("transformers_modules.")
        assert_computes(seen[auto_class], saved.expected[name], own_head=auto_class == readers[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_folder_saved_by_the_loaded_copy_loads_alone_too(saved, name):
    for seen in saved.second[name].values():
        assert_computes(seen, saved.expected[name], own_head=True)
    code = {file.name: file.read_bytes() for file in saved.folders["AutoModel"].glob("*.py")}
    assert {file.name: file.read_bytes() for file in saved.again[name].glob("*.py")} == code


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_saved_config_names_all_auto_classes_in_its_own_folder(saved, name):
    for folder in (saved.folders[name], saved.again[name])[name == "code_elsewhere" :]:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAP
        for target in auto_map.values():
            assert (folder / f"{target.split('.')[0]}.py").exists()


def test_a_config_loaded_from_a_hub_repository_is_saved_without_its_id(tmp_path):
    """Transformers puts the repository's id in front of each name when it reads a config from the Hub."""
    prefixed = {auto_class: f"{REPO_ID}--{target}" for auto_class, target in AUTO_MAP.items()}
    config = LoopedConfig.from_dict({"model_type": "looped", "auto_map": prefixed})
    assert config.auto_map == prefixed
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.slow
def test_a_config_that_names_another_repository_takes_the_code_from_there(saved):
    assert not list(saved.folders["code_elsewhere"].glob("*.py"))
    for seen in saved.first["code_elsewhere"].values():
        assert seen["module"].startswith("transformers_modules.someone.looped.")


@pytest.mark.slow
def test_tokenizer_and_pipeline_run_alone(saved):
    model = LoopedForCausalLM.from_pretrained(saved.folders["with_tokenizer"])
    tokens = model.generate(TOKENS[:1, :3], max_new_tokens=4, do_sample=False)
    assert saved.first["with_tokenizer"]["text"] == {"prompt": TOKENS[0, :3].tolist(), "answer": tokens[0].tolist()}


def test_pushing_while_saving_uploads_the_code(tmp_path):
    with uploads_to(tmp_path / "hub"):
        tiny_config().save_pretrained(str(tmp_path / "here"), push_to_hub=True, repo_id=REPO_ID)
        tiny_model().save_pretrained(tmp_path / "there", push_to_hub=True, repo_id=REPO_ID)
    code = {file.name for file in copy_code(tmp_path / "code")}
    assert code <= {path.name for path in (tmp_path / "hub" / "1").iterdir()}
    assert code <= {path.name for path in (tmp_path / "hub" / "2").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("name", [name for name in WAYS if WAYS[name][1]])
def test_folder_loads_with_the_package(saved, name, trust_remote_code):
    """Without `trust_remote_code` no code of the folder runs, and with it the package's classes still win."""
    auto_class = WAYS[name][1][-1]
    model = getattr(transformers, auto_class).from_pretrained(saved.folders[name], trust_remote_code=trust_remote_code)
    assert type(model) is HEADS[auto_class]
    assert type(model.config) is LoopedConfig
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS)[0], saved.expected[name]["output"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_shared_layer_is_on_disk_once(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    assert layers == {str(layer) for layer in range(model.config.num_stored_layers)}


def imports_of(file):
    """(node, is it at top level, possibly under `if TYPE_CHECKING`) of every import statement in `file`."""
    tree = ast.parse(file.read_text())
    top = [*tree.body, *(inner for node in tree.body if isinstance(node, ast.If) for inner in node.body)]
    return [(node, node in top) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_carried_files_import_torch_transformers_and_each_other_only(tmp_path):
    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    carried = copy_code(tmp_path)
    names = {file.stem for file in carried}
    assert {"configuration_looped", "modeling_looped", "remote_code"} <= names
    for file in carried:
        for node, _ in imports_of(file):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in names, f"{file.name}:{node.lineno}"
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {module.split(".")[0] for module in modules} <= allowed, f"{file.name}:{node.lineno}"


def test_carried_files_lie_flat_and_import_with_one_dot_at_the_top(tmp_path):
    """The only form that Transformers follows when it copies a custom model's code."""
    for file in copy_code(tmp_path):
        assert (PACKAGE / file.name).read_bytes() == file.read_bytes()
        for node, at_top in imports_of(file):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert at_top, f"{file.name}:{node.lineno}"
                assert node.level == 1, f"{file.name}:{node.lineno}"
                assert node.module, f"{file.name}:{node.lineno}"
                assert "." not in node.module, f"{file.name}:{node.lineno}"
