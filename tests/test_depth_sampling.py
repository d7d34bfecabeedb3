"""Which depths are drawn: their distributions, their key, and when a call draws at all.

What a depth does to a forward and its gradients: `test_depth.py`; the `Trainer`: `test_depth_training.py`.
"""

import copy
import math

import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from random_configs import modest

from modeling_looped import LoopedForCausalLM
from modeling_looped.configuration_looped import STRATEGY_FIELDS
from modeling_looped.depth_sampling import SampledDepth
from modeling_looped.registry import BuildContext

DEPTH_SAMPLINGS = STRATEGY_FIELDS["depth_sampling"]
SAMPLED = sorted(set(DEPTH_SAMPLINGS) - {"fixed"})
CONTEXT = BuildContext(hidden_size=8, num_core_layers=2, initializer_range=0.02, rms_norm_eps=1e-5)
TOKENS = random_tokens(4, 9)


def sampling(name: str, **params) -> SampledDepth:
    module = DEPTH_SAMPLINGS.build(DEPTH_SAMPLINGS.normalise({"type": name, **params}), CONTEXT)
    module.init_weights()
    return module


def drawn(module: SampledDepth, steps: int, *, num_loops: int = 4, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """The depths of the next `steps` steps: [steps], [steps, B] or [steps, B, S]."""
    embeds = torch.zeros(*tokens.shape, 8)
    draws = [module(tokens, None, num_loops) for _ in range(steps)]
    if module.params.granularity == "batch":
        return torch.tensor([depth.loops for depth in draws])
    assert all(depth.loops == depth.each.max() for depth in draws)
    return torch.stack([depth.counts(embeds) for depth in draws])


def sampled_model(seed: int = 0, name: str = "poisson", **params) -> LoopedForCausalLM:
    settings = {key: params.pop(key) for key in ("backprop_loops", "halting", "num_loops") if key in params}
    spec = {"type": name, "seed": seed, **params}
    torch.manual_seed(0)
    return tiny_model(depth_sampling=spec, **settings).train()


# --- distributions ------------------------------------------------------------------------------------------------


def test_poisson_is_the_textbook_formula_below_one_raised_to_it():
    table = sampling("poisson").probabilities(6)
    expected = [math.exp(-6) * 6**r / math.factorial(r) for r in range(len(table) + 1)]
    expected[1] += expected[0]
    torch.testing.assert_close(table, torch.tensor(expected[1:], dtype=torch.float64), rtol=0, atol=1e-7)


@given(mean=st.floats(1, 40), sigma=st.floats(0.05, 1.0))
@modest
def test_lognormal_poisson_has_the_moments_of_its_definition(mean, sigma):
    """E[r] = mean + 1, Var[r] = mean + mean^2 (e^{sigma^2} - 1): Poisson's variance, and that of its rate."""
    table = sampling("lognormal_poisson", mean=mean, sigma=sigma).probabilities(4)
    depths = torch.arange(1, len(table) + 1, dtype=torch.float64)
    average = (table * depths).sum()
    assert average == pytest.approx(mean + 1, rel=1e-4)
    variance = (table * (depths - average) ** 2).sum()
    assert variance == pytest.approx(mean + mean**2 * math.expm1(sigma**2), rel=2e-2)


def test_a_mean_that_is_left_out_is_the_configs_loop_count():
    for name in ("poisson", "lognormal_poisson"):
        assert torch.equal(sampling(name).probabilities(5), sampling(name, mean=5).probabilities(9))
    assert sampling("uniform").probabilities(5).tolist() == [1 / 9] * 9


@given(
    name=st.sampled_from(SAMPLED),
    granularity=st.sampled_from(["batch", "sequence", "token"]),
    low=st.integers(1, 4),
    extra=st.integers(0, 6),
    seed=st.integers(0, 2**31 - 1),
)
@modest
def test_draws_lie_within_the_bounds_and_follow_the_table(name, granularity, low, extra, seed):
    module = sampling(name, granularity=granularity, min_loops=low, max_loops=low + extra, seed=seed)
    table = module.probabilities(4)
    assert table.sum() == pytest.approx(1)
    assert (table[: low - 1] == 0).all()
    assert len(table) <= low + extra
    draws = drawn(module, 60).flatten()
    assert low <= draws.min()
    assert draws.max() <= low + extra
    depths = torch.arange(1, len(table) + 1, dtype=torch.float64)
    mean = (table * depths).sum()
    deviation = ((table * (depths - mean) ** 2).sum() / len(draws)).sqrt()
    assert abs(draws.double().mean() - mean) <= 5 * deviation + 1e-9


@pytest.mark.parametrize("name", SAMPLED)
def test_many_draws_have_the_frequencies_of_the_table(name):
    """A chi-squared statistic of 20,000 tokens, five standard deviations above its mean at most."""
    module = sampling(name, granularity="token")
    draws = drawn(module, 5, tokens=random_tokens(8, 500)).flatten()
    table = module.probabilities(4)
    counts = torch.bincount(draws - 1, minlength=len(table)).double()
    common = table * len(draws) >= 10
    expected = table[common] * len(draws)
    statistic = ((counts[common] - expected) ** 2 / expected).sum()
    freedom = int(common.sum()) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("curriculum", "middle"), [("linear", 0.5), ("one_minus_sqrt", 1 - math.sqrt(0.5))])
def test_a_curriculum_moves_the_mean_from_one_to_its_full_value(curriculum, middle):
    grows = {"curriculum": curriculum, "curriculum_steps": 100}
    module = sampling("poisson", mean=9, **grows)
    for step, share in ((0, 0.0), (50, middle), (100, 1.0), (10**9, 1.0)):
        assert module.progress(step) == pytest.approx(share)
        mean = 1 + 8 * share
        assert torch.equal(module.probabilities(4, share), sampling("poisson", mean=mean).probabilities(4))
    draws = drawn(module, 400).double()
    assert draws[:10].mean() < 3 < 7 < draws[100:].mean()
    assert drawn(sampling("uniform", min_loops=2, max_loops=9, **grows), 1) == 2


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
def test_a_draw_depends_on_seed_and_step_and_on_no_generator(granularity):
    module = sampling("poisson", granularity=granularity, seed=7)
    before = torch.get_rng_state()
    draws = drawn(module, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.step == 20
    torch.manual_seed(99)
    again = sampling("poisson", granularity=granularity, seed=7)
    again.step.fill_(12)  # as a checkpoint does
    assert torch.equal(drawn(again, 8), draws[12:])
    assert not torch.equal(drawn(sampling("poisson", granularity=granularity, seed=8), 20), draws)
    assert len(draws.unique(dim=0)) > 3


def test_rows_draw_by_their_tokens_so_that_ranks_with_other_rows_draw_otherwise():
    """And ranks with the same rows draw the same: those of a tensor-parallel group hold a batch together."""
    first, same, other = (sampling("poisson", granularity="sequence") for _ in range(3))
    draws = drawn(first, 30)
    assert torch.equal(drawn(same, 30), draws)
    assert not torch.equal(drawn(other, 30, tokens=random_tokens(4, 9, seed=1)), draws)
    assert all(len(step.unique()) > 1 for step in draws[:10])
    twins = drawn(sampling("poisson", granularity="sequence"), 30, tokens=TOKENS[:1].expand(4, -1))
    assert any(len(step.unique()) > 1 for step in twins), "rows with the same tokens still differ"
    embeds = [sampling("poisson", granularity="sequence")(None, torch.zeros(4, 9, 8), 4).each for _ in range(2)]
    assert torch.equal(*embeds), "without token ids the place in the batch decides"


# --- when a call draws --------------------------------------------------------------------------------------------


def test_only_training_draws_and_only_where_no_loop_count_is_given():
    model = sampled_model()
    step = model.model.depth_sampling.step
    depths = [int(model(TOKENS).num_loops[0]) for _ in range(8)]
    assert len(set(depths)) > 1
    assert step == 8
    assert model(TOKENS, num_loops=2).num_loops is None
    with torch.no_grad():
        assert model(TOKENS).num_loops is None
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)  # in training mode, as trainers of policies do
    model.eval()
    evaluated = model(TOKENS)
    assert evaluated.num_loops is None
    assert torch.equal(evaluated.logits, model(TOKENS, num_loops=3).logits)
    assert step == 8


def test_the_drawn_depth_is_the_one_that_runs_and_the_one_that_is_reported():
    model = sampled_model(max_loops=5)
    for _ in range(6):
        output = model(TOKENS, labels=TOKENS, output_loop_hidden_states=True, output_hidden_states=True)
        (loops,) = set(output.num_loops.tolist())
        assert output.num_loops.shape == (4,)
        assert len(output.loop_hidden_states) == loops + 1
        assert len(output.hidden_states) == model.config.slot_layout(loops).num_slots + 1
        again = model(TOKENS, labels=TOKENS, num_loops=loops)
        assert torch.equal(again.loss, output.loss)
    last = model(TOKENS, None, output_hidden_states=[-1])  # arguments by place, and the last state of this depth
    assert len(last.hidden_states) == model.config.slot_layout(int(last.num_loops[0])).num_slots + 1
    assert [state is None for state in last.hidden_states] == [True] * (len(last.hidden_states) - 1) + [False]


def test_a_fixed_depth_costs_nothing_and_has_nothing_in_the_checkpoint():
    model = tiny_model().train()
    assert [name for name in model.state_dict() if "depth_sampling" in name] == []
    assert model(TOKENS).num_loops is None


def test_training_records_the_largest_depth_and_does_not_warn_of_it(caplog):
    model = sampled_model()
    depths = [int(model(TOKENS).num_loops[0]) for _ in range(12)]
    assert model.config.max_trained_loops == max(depths)
    model.config.max_trained_loops = 50
    model(TOKENS)
    assert model.config.max_trained_loops == 50
    assert caplog.records == []


def test_a_checkpoint_of_fixed_depth_loads_into_sampling_and_back_in_silence(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "fixed")
    load = LoopedForCausalLM.from_pretrained
    spec = {"type": "poisson", "min_loops": 3}
    loaded, report = load(tmp_path / "fixed", depth_sampling=spec, output_loading_info=True)
    assert report["missing_keys"] == set()
    assert loaded.model.depth_sampling.step == 0
    loaded.train()(TOKENS)
    loaded.save_pretrained(tmp_path / "sampled")
    again = load(tmp_path / "sampled", dtype=torch.bfloat16)
    assert again.model.depth_sampling.step == 1
    assert again.model.depth_sampling.step.dtype == torch.int64
    back, report = load(tmp_path / "sampled", depth_sampling="fixed", output_loading_info=True)
    assert report["unexpected_keys"] == set()
    assert torch.equal(back(TOKENS).logits, loaded.eval()(TOKENS).logits)
    assert caplog.records == []


def test_an_adapter_checkpoint_carries_the_step_if_it_is_told_to():
    """PEFT saves the adapter alone; `modules_to_save` puts the counter beside it."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["depth_sampling"], task_type="CAUSAL_LM")
    model = get_peft_model(sampled_model(), config)
    straight = [int(model(input_ids=TOKENS).num_loops[0]) for _ in range(9)]
    model = get_peft_model(sampled_model(), copy.deepcopy(config))
    assert [int(model(input_ids=TOKENS).num_loops[0]) for _ in range(4)] == straight[:4]
    saved = get_peft_model_state_dict(model)
    assert [key for key in saved if key.endswith("depth_sampling.step")]
    resumed = get_peft_model(sampled_model(), copy.deepcopy(config))
    set_peft_model_state_dict(resumed, saved)
    assert [int(resumed(input_ids=TOKENS).num_loops[0]) for _ in range(5)] == straight[4:]


def test_a_model_that_trains_at_sampled_depth_unrolls_as_any_other():
    model = tiny_model(**VARIANTS["in_place"], depth_sampling="poisson")
    torch.testing.assert_close(model.unroll()(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"granularity": "row"}, "granularity='row' must be one of: batch, sequence, token"),
        ({"curriculum": "cosine"}, "curriculum='cosine' must be one of: none, linear, one_minus_sqrt"),
        ({"min_loops": 0}, "min_loops=0 must be at least 1"),
        ({"min_loops": 3, "max_loops": 2}, "max_loops=2 must be None or at least min_loops=3"),
        ({"curriculum": "linear"}, "curriculum_steps=0 with curriculum='linear'"),
        ({"curriculum_steps": 10}, "curriculum_steps=10 with curriculum='none'"),
        ({"seed": -1}, "seed=-1 must lie in 0..2147483647"),
        ({"mean": 0.5}, "mean=0.5 must be None .* or a number of at least 1"),
        ({"type": "lognormal_poisson", "sigma": 0.0}, r"sigma=0.0 must lie in \(0, 2\]"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=f"depth_sampling: type .*{message}"):
        DEPTH_SAMPLINGS.normalise({"type": "poisson", **spec})


def test_depths_of_rows_are_refused_beside_a_halting_rule():
    anchors = {"depth_sampling": {"type": "uniform", "granularity": "sequence"}, "depth_attention": "anchors"}
    with pytest.raises(StrictDataclassError, match="granularity='sequence' with depth_attention='anchors'"):
        tiny_config(**anchors)
    with pytest.raises(ValueError, match="depth_attention='anchors' reads all loops of the call"):
        tiny_model(depth_attention="anchors")(random_tokens(2), num_loops=torch.tensor([1, 2]))
    with pytest.raises(StrictDataclassError, match="depth_sampling: granularity='token' with halting='gate'"):
        tiny_config(halting="gate", depth_sampling={"type": "poisson", "granularity": "token"})
    sampled_model(halting="gate")(TOKENS, labels=TOKENS).loss.backward()


def test_sampling_is_refused_without_a_core_and_after_the_model_is_built():
    with pytest.raises(StrictDataclassError, match="depth_sampling='poisson' acts on the core"):
        tiny_config(num_core_layers=0, depth_sampling="poisson")
    model = tiny_model()
    model.config.depth_sampling = "poisson"
    with pytest.raises(
        ValueError, match=r"config\.depth_sampling=.*'poisson'.* was written after the model was built"
    ):
        model(TOKENS)
