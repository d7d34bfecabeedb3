"""Options that published configs offer, each as the original's own code computed it: imported, run, exported."""

import json

import pytest
import torch
from fixtures.published_options import FOLDER, OPTIONS, option, option_folder
from helpers import assert_close, stepwise_logits
from safetensors.torch import load_file
from transformers import DynamicCache

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.conversion import export_checkpoint, import_checkpoint


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_computes_what_the_original_does_and_goes_back_bit_for_bit(name, tmp_path):
    recorded, said = load_file(FOLDER / name / "io.safetensors"), option(name)
    source = option_folder(name, tmp_path / "published")
    manifest = import_checkpoint(source, tmp_path / "looped", settings=said["settings"])
    assert manifest["family"] == said["family"]
    model = LoopedForCausalLM.from_pretrained(tmp_path / "looped").eval()
    whole_sequence = getattr(model.model, "halting", None) is not None and model.model.halting.reads_whole_sequence
    with torch.no_grad():
        output = model(recorded["input_ids"])
        logits = output.logits
        if not whole_sequence:
            assert_close(
                stepwise_logits(model, recorded["input_ids"], DynamicCache(config=model.config), (5,)), logits
            )
    if said["family"] == "mor":  # the recording is of a router that chooses
        assert len(output.exit_loops.unique()) > 1
    # three times what fp32 makes of the original itself, but no less than two different orders of summation make
    assert_close(logits, recorded["logits"], atol=min(max(3 * said["run"]["noise_floor"], 2e-5), 1e-4))

    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    published, back = (load_file(tmp_path / place / "model.safetensors") for place in ("published", "back"))
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)


def refusal(name, tmp_path, *, changes=None, settings=None):
    """What importing the recording says when its config has `changes` and nothing but `settings` is set."""
    folder = tmp_path / "published"
    source = option_folder(name, folder)
    config = {**option(name)["peer_config"], **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be converted") as error:
        import_checkpoint(source, tmp_path / "looped", settings=settings)
    assert not (tmp_path / "looped").exists()
    return str(error.value)


def test_a_llama_looped_in_place_asks_for_its_loop_and_never_passes_for_a_stacked_one(tmp_path):
    message = refusal("looped_in_place_olmo2", tmp_path)
    for name in ("num_rec", "start_index", "block_size"):
        assert f"{name} is missing" in message
    assert "say them with --set" in message


def test_where_a_checkpoint_names_its_parts_only_the_loop_count_is_asked_for(tmp_path):
    source = option_folder("looped_in_place_llama", tmp_path / "published")
    with pytest.raises(ValueError, match="num_rec is missing"):
        import_checkpoint(source, tmp_path / "looped")
    import_checkpoint(source, tmp_path / "looped", settings={"num_rec": 5})
    config = LoopedConfig.from_pretrained(tmp_path / "looped")
    assert (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers) == (1, 2, 2)
    assert config.num_loops == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rec": 0}, "num_rec=0 (must be an integer of at least 1)"),
        ({"block_size": 9}, "start_index=2 and block_size=9 go beyond num_hidden_layers=7"),
        ({"coda_size": 4}, "coda_size=4 (must be an integer in 0..3, the layers there are)"),
    ],
)
def test_a_loop_in_place_that_does_not_fit_is_refused(settings, message, tmp_path):
    given = {**option("looped_in_place_olmo2")["settings"], **settings}
    assert message in refusal("looped_in_place_olmo2", tmp_path, settings=given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_cache": True}, "update_cache, keys that some tokens renew in every loop, is not supported"),
        ({"sharing": "cycle"}, "supported: that of the weights, Sharing(kind='middle_cycle', loops=3)"),
        ({"num_recursion": 2}, "supported: that of the weights"),
    ],
)
def test_keys_and_values_shared_otherwise_than_the_weights_are_refused(changes, message, tmp_path):
    said = option("mor_expert_plain_kv")
    changes = {"kv_sharing": {**said["peer_config"]["kv_sharing"], **changes}}
    assert message in refusal("mor_expert_plain_kv", tmp_path, changes=changes, settings=said["settings"])


def test_a_stacked_config_may_say_nothing_that_its_class_would_not_read(tmp_path):
    stock = {"architectures": ["LlamaForCausalLM"], "num_loops": 3, "recursion": {"sharing": "cycle"}}
    message = refusal("looped_in_place_llama", tmp_path, changes=stock, settings={"num_rec": 2})
    assert "num_loops=3 (not a field that is known" in message
    assert "recursion={'sharing': 'cycle'} (not a field that is known" in message
