"""From a published checkpoint's files to a looped one: checked, then written shard by shard, whole or not at all."""

import gc
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.published import (
    FAMILY_OF,
    FIXTURES,
    FOLDER,
    SETTINGS,
    imported_folder,
    load,
    published_folder,
    recording,
)
from helpers import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from teachers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, GenerationConfig

from modeling_looped.conversion import ConversionError, import_checkpoint
from modeling_looped.conversion.importing import ASIDE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path) -> Path:
    """A published Ouro checkpoint."""
    return published_folder("ouro", tmp_path / "published")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_folder_loads_with_the_auto_classes_and_nothing_is_missing(name, tmp_path):
    looped = imported_folder(name, tmp_path)
    auto = AutoModelForMaskedLM if name == "albert" else AutoModelForCausalLM
    model, loading = auto.from_pretrained(looped, output_loading_info=True)
    assert not any(loading.values())
    assert (looped / "modeling_looped.py").is_file()
    manifest = json.loads((looped / "looped_manifest.json").read_text())
    assert manifest["family"] == FAMILY_OF[name]
    assert model.config.architectures == [type(model).__name__]


def test_the_manifest_says_what_it_was_made_of_and_how(source, tmp_path):
    output = tmp_path / "looped"
    returned = import_checkpoint(
        str(source), output, recording=FOLDER / "ouro" / "io.safetensors", command="import_checkpoint.py ..."
    )
    manifest = json.loads((output / "looped_manifest.json").read_text())
    assert manifest == json.loads(json.dumps(returned))

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert manifest["command"] == "import_checkpoint.py ..."
    assert manifest["source"]["name"] == str(source)
    assert manifest["source"]["sha256"]["model.safetensors"] == digest(source / "model.safetensors")
    assert manifest["sha256"]["model.safetensors"] == digest(output / "model.safetensors")
    assert manifest["original"]["config"] == json.loads((source / "config.json").read_text())
    assert manifest["original"]["files"].keys() == {"model.safetensors"}
    assert manifest["checks"]["original"]["logits"] <= manifest["checks"]["tolerance"] == 1e-4
    assert manifest["checks"]["padding"].keys() == {"left", "right"}
    assert manifest["versions"].keys() >= {"python", "torch", "transformers", "modeling_looped"}


def test_a_result_that_differs_from_the_recording_leaves_nothing_behind(source, tmp_path):
    wrong = recording("ouro")
    wrong["logits"] = wrong["logits"] + 1e-3
    save_file(wrong, tmp_path / "wrong.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=r"differences logits 1\.00e-03, .* nothing was written"):
        import_checkpoint(str(source), tmp_path / "looped", recording=tmp_path / "wrong.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_already_there_survives_unless_it_may_be_replaced(source, tmp_path):
    output = tmp_path / "looped"
    import_checkpoint(str(source), output)
    with pytest.raises(ValueError, match="is not empty: choose another folder, or pass --force"):
        import_checkpoint(str(source), output)
    import_checkpoint(str(source), output, overwrite=True)
    with pytest.raises(ValueError, match="not the result of a conversion"):
        import_checkpoint(str(source), source, overwrite=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            r"these are missing: model\.layers\.1\.mlp\.up",
        ),
        (lambda state: state.update(extra=torch.ones(2)), r"no rule says where these go: extra"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(65)}),
            r"model\.norm\.weight is \[65\], and the config makes it \[64\]",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"not plain floating-point numbers \(quantised\?\): model\.norm\.weight",
        ),
    ],
    ids=["missing", "unknown", "shape", "quantised"],
)
def test_tensors_that_do_not_fit_are_refused_by_name_before_anything_is_written(change, named, source, tmp_path):
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        import_checkpoint(str(source), tmp_path / "looped")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_table_of_another_rotary_base_is_refused(tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    config = json.loads((source / "config.json").read_text())
    config["rope_settings"]["rope_base"] = 10000
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="freqs_cis is not the table that the config describes"):
        import_checkpoint(str(source), tmp_path / "looped")
    assert not (tmp_path / "looped").exists()


def test_tensors_that_the_model_does_not_hold_are_kept_away_from_its_weights(tmp_path):
    looped = imported_folder("parcae", tmp_path)
    assert load_file(looped / ASIDE).keys() == {"freqs_cis"}
    assert [path.name for path in looped.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_are_kept(dtype, source, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors")
    import_checkpoint(str(source), tmp_path / "looped")
    assert {tensor.dtype for tensor in load_file(tmp_path / "looped" / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "looped").dtype == dtype


def test_types_are_changed_on_demand(source, tmp_path):
    import_checkpoint(str(source), tmp_path / "looped", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "looped").dtype == torch.bfloat16
    kept = load_file(tmp_path / "looped" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(kept, load_file(source / "model.safetensors")["model.norm.weight"].bfloat16())


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.pt"])
def test_files_that_torch_wrote_are_read_too(file_name, tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"]  # tied, and stored under both names
    torch.save(state, source / file_name)
    (source / "model.safetensors").unlink()
    import_checkpoint(str(source), tmp_path / "looped", recording=FOLDER / "parcae" / "io.safetensors")
    expected = recording("parcae")
    assert_close(load("parcae", tmp_path / "looped")(expected["input_ids"]).logits, expected["logits"])


def test_a_training_state_is_no_state_dict(tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    (source / "model.safetensors").unlink()
    torch.save({"model": {"weight": torch.ones(2)}, "step": 3}, source / "model.pt")
    with pytest.raises(ValueError, match=r"is no flat state dict: these are not tensors: model, step"):
        import_checkpoint(str(source), tmp_path / "looped")


def shard(folder: Path, parts: int) -> None:
    """Cut the one weight file of `folder` into shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file_name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(state)[part::parts]
        save_file({name: state[name] for name in names}, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_sources_are_read_and_shards_of_the_wanted_size_written(tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    shard(source, 3)
    looped = tmp_path / "looped"
    import_checkpoint(str(source), looped, max_shard_bytes=100_000)
    index = json.loads((looped / "model.safetensors.index.json").read_text())
    files = sorted(looped.glob("model-*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {path.name for path in files}
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in files]
    assert all(sum(size) <= 100_000 or len(size) == 1 for size in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    expected = recording("parcae")
    assert_close(load("parcae", looped)(expected["input_ids"]).logits, expected["logits"])


def test_an_index_that_names_what_its_files_lack_is_refused(source, tmp_path):
    shard(source, 2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names tensors that its files lack: ghost"):
        import_checkpoint(str(source), tmp_path / "looped")


def live_tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each memory counted once."""
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_more_than_a_shard_and_the_tensors_it_is_made_of_is_in_memory(tmp_path):
    """Counted whenever a shard is about to be written, when there is most."""
    source = published_folder("huginn", tmp_path / "published")
    weights = load_file(source / "model.safetensors")
    total, largest = sum(t.nbytes for t in weights.values()), max(t.nbytes for t in weights.values())
    del weights
    gc.collect()
    before, seen = live_tensor_bytes(), []

    def watch(line: str) -> None:
        if line.startswith("   shard"):
            seen.append(live_tensor_bytes() - before)

    shard_size = 100_000
    import_checkpoint(str(source), tmp_path / "looped", max_shard_bytes=shard_size, report=watch)
    assert len(seen) > 4
    assert max(seen) <= shard_size + 3 * largest < total / 2


def test_tokenizer_and_generation_config_come_along_and_agree_on_where_a_text_ends(tmp_path):
    source = published_folder("huginn", tmp_path / "published")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(source)
    GenerationConfig(eos_token_id=3, num_steps=4, temperature=0.7, do_sample=True).save_pretrained(source)
    (source / "LICENSE").write_text("the original's")
    manifest = import_checkpoint(str(source), tmp_path / "looped")

    brought = AutoTokenizer.from_pretrained(tmp_path / "looped")
    assert brought("the cat sat").input_ids == tokenizer("the cat sat").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "looped")
    # 3 was configured, and the tokenizer and its chat template end with 2
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [3, 2]
    assert model.generation_config.pad_token_id == model.config.pad_token_id == brought.pad_token_id == 0
    assert model.generation_config.temperature == 0.7
    assert model.generation_config.num_loops == 4
    assert not hasattr(model.generation_config, "num_steps")
    assert (tmp_path / "looped" / "LICENSE").read_text() == "the original's"
    assert "generation config: num_steps 4 -> num_loops 4" in manifest["special_tokens"]
    assert manifest["original"]["generation_config"]["num_steps"] == 4


def test_a_tokenizer_that_cannot_be_read_is_said_so(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the checkpoint's tokenizer cannot be read"):
        import_checkpoint(str(source), tmp_path / "looped")
    assert not (tmp_path / "looped").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"family": "gru"}, r"family='gru' must be one of: auto, parcae, "),
        ({"source": "no/such-thing"}, r"source='no/such-thing' is neither a folder nor"),
        ({"revision": "main"}, r"revision='main' names a commit on the Hub, and source="),
        ({"family": "nanbeige"}, r"early_exit_threshold=1\.0 \(not a field that is known"),
        ({"recording": Path("nothing.safetensors")}, r"nothing\.safetensors"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_what_is_allowed(options, named, source, tmp_path):
    with pytest.raises((ValueError, OSError), match=named):
        import_checkpoint(**{"source": str(source), "output": tmp_path / "looped", **options})
    assert not (tmp_path / "looped").exists()


def test_a_checkpoint_of_no_family_is_refused_with_those_there_are(source, tmp_path):
    (source / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(ValueError, match=r"model_type='gpt_oss' and .* name one with --family: parcae, huginn, "):
        import_checkpoint(str(source), tmp_path / "looped")


def test_a_folder_without_weights_is_refused(source, tmp_path):
    (source / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no weights: none of model\.safetensors, pytorch_model\.bin, model\.pt"
    ):
        import_checkpoint(str(source), tmp_path / "looped")


@pytest.fixture(scope="module")
def program():
    """The script `conversion/import_checkpoint.py` as a module."""
    path = ROOT / "conversion" / "import_checkpoint.py"
    spec = importlib.util.spec_from_file_location("import_program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program_converts_what_its_options_say(program, tmp_path, capsys):
    source = published_folder("relaxed_recursive_lora", tmp_path / "published")
    settings = SETTINGS["relaxed_recursive_lora"]
    arguments = ["--source", str(source), "--output", str(tmp_path / "looped"), "--max-shard-size", "200KB"]
    arguments += [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    arguments += ["--verify", str(FOLDER / "relaxed_recursive_lora" / "io.safetensors")]
    assert program.main(arguments) == 0
    assert "largest difference from the original" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "looped" / "looped_manifest.json").read_text())
    assert manifest["command"].startswith("python conversion/import_checkpoint.py --source ")
    assert manifest["original"]["settings"] == settings


def test_the_program_ends_with_a_message_and_status_1(program, source, tmp_path, capsys):
    arguments = ["--source", str(source), "--output", str(tmp_path / "looped")]
    verify = ["--verify", str(FOLDER / "ouro" / "io.safetensors"), "--tolerance", "1e-12"]
    for more, message in ((["--family", "parcae"], "this parcae checkpoint"), (verify, "the converted model is not")):
        assert program.main([*arguments, *more]) == 1
        assert f"import_checkpoint.py: {message}" in capsys.readouterr().err
    assert not (tmp_path / "looped").exists()


@pytest.mark.parametrize(
    "wrong",
    [["--max-shard-size", "5"], ["--set", "loops"], ["--dtype", "int8"], ["--tolerance", "0"], ["--family", "gru"]],
    ids=str,
)
def test_options_that_make_no_sense_end_with_the_usage_and_status_2(program, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--source", "a", "--output", "b", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_file_of_weights_that_is_cut_short_is_named(program, source, tmp_path, capsys):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert program.main(["--source", str(source), "--output", str(tmp_path / "looped")]) == 1
    assert f"import_checkpoint.py: {file} is not a whole safetensors file" in capsys.readouterr().err


def test_a_file_of_torch_that_is_cut_short_is_named(tmp_path):
    source = published_folder("parcae", tmp_path / "published")
    torch.save(load_file(source / "model.safetensors"), source / "model.pt")
    (source / "model.safetensors").unlink()
    (source / "model.pt").write_bytes((source / "model.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.pt is not a whole file of weights that torch wrote"):
        import_checkpoint(str(source), tmp_path / "looped")


def test_a_recording_that_is_no_safetensors_file_is_named(program, source, tmp_path, capsys):
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("What the original said: nothing.", encoding="utf-8")
    arguments = ["--source", str(source), "--output", str(tmp_path / "looped"), "--verify", str(wrong)]
    assert program.main(arguments) == 1
    assert f"recording={str(wrong)!r} is not a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("ouro", {"input_ids": None}, "the recording lacks input_ids; it holds "),
        ("ouro", {"logits": None}, "the recording lacks logits; it holds "),
        ("ouro", {"left.attention_mask": None}, "the recording lacks left.attention_mask; it holds "),
        ("hrm_text", {"prefix.token_type_ids": None}, "the recording lacks prefix.token_type_ids; it holds "),
        ("ut_decoder", {"decoder_input_ids": None}, "the recording lacks decoder_input_ids; it holds "),
        (
            "ouro",
            {"logits": torch.zeros(2, 16, 100)},
            "recording's logits is [2, 16, 100], and the model makes it [2, 16, 128]",
        ),
        ("ouro", {"right.logits": torch.zeros(1, 16, 128)}, "recording's right.logits is [1, 16, 128], and the model"),
        ("ouro", {"input_ids": torch.full((2, 16), 128)}, "input_ids, torch.int64 [2, 16], must be token ids [B, S]"),
        ("ouro", {"input_ids": torch.ones(2, 16)}, "input_ids, torch.float32 [2, 16], must be token ids [B, S]"),
        ("ouro", {"input_ids": torch.ones(16, dtype=torch.int64)}, "input_ids, torch.int64 [16], must be token ids"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_recording_that_cannot_be_compared_with_is_refused_before_a_tensor_is_read(
    program, name, change, named, tmp_path, capsys
):
    source = published_folder(name, tmp_path / "published")
    changed = {key: tensor for key, tensor in {**recording(name), **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "recording.safetensors")
    arguments = ["--source", str(source), "--output", str(tmp_path / "looped")]
    arguments += [f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.get(name, {}).items()]
    assert program.main([*arguments, "--verify", str(tmp_path / "recording.safetensors")]) == 1
    printed = capsys.readouterr()
    assert named in printed.err
    assert "writing the weights" not in printed.out


def test_recorded_states_of_another_number_of_loops_are_refused(source, tmp_path):
    original = recording("ouro")
    save_file({**original, "loop_states": original["loop_states"][:1].clone()}, tmp_path / "recording.safetensors")
    with pytest.raises(ValueError, match=r"loop_states is \[1, 2, 16, 64\], and the model makes it \[4, 2, 16, 64\]"):
        import_checkpoint(str(source), tmp_path / "looped", recording=tmp_path / "recording.safetensors")
    assert not (tmp_path / "looped").exists()


def test_answers_to_questions_are_no_logits_to_compare_with(tmp_path):
    source = published_folder("albert", tmp_path / "published")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["AlbertForQuestionAnswering"]}))
    state = load_file(source / "model.safetensors")
    body = {name: tensor for name, tensor in state.items() if not name.startswith("predictions.")}
    width = body["albert.encoder.embedding_hidden_mapping_in.weight"].shape[0]
    save_file(
        {**body, "qa_outputs.weight": torch.ones(2, width), "qa_outputs.bias": torch.ones(2)},
        source / "model.safetensors",
    )
    with pytest.raises(ValueError, match="a LoopedForQuestionAnswering has none to compare with them"):
        import_checkpoint(str(source), tmp_path / "looped", recording=FOLDER / "albert" / "io.safetensors")
    assert not (tmp_path / "looped").exists()


@pytest.mark.slow
def test_both_programs_run_from_the_command_line(tmp_path):
    published_folder("nanbeige", tmp_path / "published")
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name, source, output in (("import", "published", "looped"), ("export", "looped", "back")):
        command = [sys.executable, str(ROOT / "conversion" / f"{name}_checkpoint.py")]
        done = subprocess.run(
            [*command, "--source", source, "--output", output],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "back"))
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)


def test_the_published_files_are_left_as_they_were(source, tmp_path):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    import_checkpoint(str(copy), tmp_path / "looped")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    with safe_open(tmp_path / "looped" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
