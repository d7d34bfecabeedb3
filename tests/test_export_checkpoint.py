"""Back to the published format: every tensor, file and field as it was."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fixtures.published import FIXTURES, SETTINGS, imported_folder, load, published_folder
from safetensors.torch import load_file, save_file
from teachers import tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, dynamic_module_utils

from modeling_looped.conversion import export_checkpoint, import_checkpoint
from modeling_looped.conversion.companions import code_named
from modeling_looped.conversion.importing import ORIGINAL
from modeling_looped.conversion.tensor_map import same_bits

ROOT = Path(__file__).parents[1]


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert actual.keys() == expected.keys()
    differing = [name for name in expected if not same_bits(actual[name], expected[name])]
    assert not differing


@pytest.mark.parametrize("name", FIXTURES)
def test_the_round_trip_is_exact_in_every_bit(name, tmp_path):
    looped = imported_folder(name, tmp_path, max_shard_bytes=100_000)
    export_checkpoint(looped, tmp_path / "back")
    files = {path.name for path in (tmp_path / "back").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    published = tmp_path / "published"
    assert_same_state(load_file(tmp_path / "back" / "model.safetensors"), load_file(published / "model.safetensors"))
    before, after = ((folder / "config.json").read_text() for folder in (published, tmp_path / "back"))
    assert json.loads(after) == json.loads(before)
    assert list(json.loads(after)) == list(json.loads(before))


@pytest.mark.parametrize("name", ["huginn", "parcae", "relaxed_recursive_lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_round_trip_is_exact_in_other_types_and_in_special_numbers(name, dtype, tmp_path):
    source = published_folder(name, tmp_path / "published")
    state = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        state[key] = tensor if key == "freqs_cis" else tensor.to(dtype)
        if key.endswith(("Wqkv.weight", "c_q.weight", "lora_A.default.weight")):
            state[key][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_file(state, source / "model.safetensors")
    import_checkpoint(str(source), tmp_path / "looped", settings=SETTINGS.get(name))
    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    assert_same_state(load_file(tmp_path / "back" / "model.safetensors"), state)


def test_shards_and_their_index_come_back_as_they_were(tmp_path):
    source = published_folder("ouro", tmp_path / "published")
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, keys in files.items():
        save_file({key: state[key] for key in keys}, source / file_name)
    (source / "model.safetensors").unlink()
    weight_map = {key: file_name for file_name, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": 123, "total_parameters": 45}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    import_checkpoint(str(source), tmp_path / "looped")
    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text()) == index
    for file_name in files:
        assert_same_state(load_file(tmp_path / "back" / file_name), load_file(source / file_name))


def test_files_of_torch_come_back_as_files_of_torch(tmp_path):
    source = published_folder("huginn", tmp_path / "published")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    import_checkpoint(str(source), tmp_path / "looped")
    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    assert_same_state(torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True), state)


def test_weights_that_the_import_changed_to_another_type_stay_so_and_it_is_said(tmp_path):
    looped = imported_folder("ouro", tmp_path, dtype=torch.bfloat16)
    lines: list[str] = []
    export_checkpoint(looped, tmp_path / "back", report=lines.append)
    before = load_file(tmp_path / "published" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert_same_state(after, {name: tensor.bfloat16() for name, tensor in before.items()})
    assert any("changed the weights to bfloat16" in line for line in lines)


def test_tokenizer_licence_and_the_original_generation_config_come_back(tmp_path):
    source = published_folder("huginn", tmp_path / "published")
    tiny_tokenizer().save_pretrained(source)
    GenerationConfig(eos_token_id=3, num_steps=4).save_pretrained(source)
    (source / "LICENSE").write_text("the original's")
    import_checkpoint(str(source), tmp_path / "looped")
    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    back = tmp_path / "back"
    assert (back / "LICENSE").read_text() == "the original's"
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written, original = (json.loads((folder / "generation_config.json").read_text()) for folder in (back, source))
    assert written == original
    assert not list(back.glob("*.py"))


def test_tokenizer_and_licence_that_training_did_not_save_come_from_the_import(tmp_path):
    source = published_folder("huginn", tmp_path / "published")
    tiny_tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("the original's")
    import_checkpoint(str(source), tmp_path / "looped")
    load("huginn", tmp_path / "looped").save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    export_checkpoint(tmp_path / "trained", tmp_path / "back", like=tmp_path / "looped")
    back = tmp_path / "back"
    assert (back / "LICENSE").read_text() == "the original's"
    assert AutoTokenizer.from_pretrained(back)("the cat sat").input_ids == tiny_tokenizer()("the cat sat").input_ids
    assert (back / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def with_code(source: Path) -> None:
    """Code of the original's, as a published Huginn has it: a config class and a module that it imports."""
    path = source / "config.json"
    config = json.loads(path.read_text())
    (source / "raven_defaults.py").write_text("STEPS = 7\n")
    (source / "raven_config_minimal.py").write_text(
        "from transformers import PretrainedConfig\n"
        "from .raven_defaults import STEPS\n\n\n"
        "class RavenConfig(PretrainedConfig):\n"
        f"    model_type = {config['model_type']!r}\n"
        "    steps = STEPS\n"
    )
    path.write_text(json.dumps({**config, "auto_map": {"AutoConfig": "raven_config_minimal.RavenConfig"}}))


@pytest.mark.parametrize("trained", [False, True])
def test_the_originals_code_comes_back_and_ours_does_not(trained, tmp_path, monkeypatch):
    source = published_folder("huginn", tmp_path / "published")
    with_code(source)
    looped = tmp_path / "looped"
    manifest = import_checkpoint(str(source), looped)
    code = {path.name: path.read_bytes() for path in source.glob("*.py")}
    assert manifest["original"]["code"] == sorted(code)
    assert {path.name: path.read_bytes() for path in (looped / ORIGINAL).glob("*.py")} == code
    assert not code.keys() & {path.name for path in looped.iterdir()}
    if trained:
        load("huginn", looped).save_pretrained(tmp_path / "trained")
    lines: list[str] = []
    back = tmp_path / "back"
    export_checkpoint(tmp_path / "trained" if trained else looped, back, like=looped, report=lines.append)
    assert {path.name: path.read_bytes() for path in back.glob("*.py")} == code
    assert not any("note:" in line for line in lines)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = AutoConfig.from_pretrained(back, trust_remote_code=True)
    assert (type(config).__name__, config.steps) == ("RavenConfig", 7)


def test_code_that_the_import_did_not_keep_is_named(tmp_path):
    source = published_folder("huginn", tmp_path / "published")
    with_code(source)
    import_checkpoint(str(source), tmp_path / "looped")
    for path in (tmp_path / "looped" / ORIGINAL).glob("*.py"):
        path.unlink()  # as in an import of before they were kept
    lines: list[str] = []
    export_checkpoint(tmp_path / "looped", tmp_path / "back", report=lines.append)
    assert any("names code that the import did not keep: raven_config_minimal.py; copy it" in line for line in lines)
    assert not list((tmp_path / "back").glob("*.py"))


def test_programs_beside_a_checkpoint_whose_config_names_no_code_stay_behind(tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    (source / "train.py").write_text("print('mine')\n")
    import_checkpoint(str(source), tmp_path / "looped")
    assert [path.name for path in (tmp_path / "looped" / ORIGINAL).iterdir()] == ["unread.safetensors"]


@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        (None, []),
        ({"AutoConfig": "a.B", "AutoModel": "c.D", "AutoModelForCausalLM": "c.E"}, ["a.py", "c.py"]),
        ({"AutoTokenizer": ["a.B", None]}, ["a.py"]),
        ({"AutoConfig": "someone/else--a.B"}, []),
    ],
    ids=str,
)
def test_the_code_that_must_lie_beside_a_config_is_what_its_auto_map_names(auto_map, files):
    assert code_named({"auto_map": auto_map}) == files


def test_trained_weights_are_exported_like_the_import_they_came_from(tmp_path):
    looped = imported_folder("huginn", tmp_path)
    model = load("huginn", looped)
    with torch.no_grad():
        model.get_parameter("model.layers.2.self_attn.k_proj.weight").mul_(2)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"has no looped_manifest\.json of an imported checkpoint.* --like"):
        export_checkpoint(tmp_path / "trained", tmp_path / "back")
    export_checkpoint(tmp_path / "trained", tmp_path / "back", like=looped)
    before = load_file(tmp_path / "published" / "model.safetensors")
    before["transformer.core_block.0.attn.Wqkv.weight"][64:128] *= 2
    assert_same_state(load_file(tmp_path / "back" / "model.safetensors"), before)

    again = tmp_path / "again"
    import_checkpoint(str(tmp_path / "back"), again)
    assert_same_state(load_file(again / "model.safetensors"), load_file(tmp_path / "trained" / "model.safetensors"))


def test_a_model_that_the_original_config_no_longer_describes_is_refused(tmp_path):
    looped = imported_folder("ouro", tmp_path)
    path = looped / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_loops": 8}))
    with pytest.raises(ValueError, match=r"num_loops=8 \(was 4\)"):
        export_checkpoint(looped, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_weights_that_are_not_the_configs_are_refused_by_name(tmp_path):
    looped = imported_folder("ouro", tmp_path)
    state = load_file(looped / "model.safetensors")
    del state["model.norm.weight"]
    save_file({**state, "extra": torch.ones(1)}, looped / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unknown or of another shape: extra"):
        export_checkpoint(looped, tmp_path / "back")


def test_the_program_writes_or_ends_with_a_message_and_status_1(tmp_path, capsys):
    path = ROOT / "conversion" / "export_checkpoint.py"
    spec = importlib.util.spec_from_file_location("export_program", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    looped = imported_folder("nanbeige", tmp_path)
    arguments = ["--source", str(looped), "--output", str(tmp_path / "back")]
    assert program.main(arguments) == 0
    assert program.main(arguments) == 1
    assert "export_checkpoint.py: output=" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "back")
    (looped / "looped_manifest.json").write_text("{}")
    assert program.main(arguments) == 1
    assert not (tmp_path / "back").exists()
