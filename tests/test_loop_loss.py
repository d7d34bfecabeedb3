"""Losses over several loops: their equations, computed token by token from the naive model, and what they refuse."""

import math

import pytest
import torch
from helpers import VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from reference import reference_logits, reference_trace
from torch import Tensor
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import DataCollatorForLanguageModeling, DynamicCache, Trainer

import modeling_looped.inputs
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForMaskedLM, LoopedModel
from modeling_looped.training import DistillationTrainer

T = 3
DEEP = {"loop_loss": "deep_supervision"}
STAGE_1 = {"loop_loss": {"type": "expected_exit", "entropy_weight": 0.3}, "halting": "gate"}
STAGE_2 = {"loop_loss": {"type": "exit_gate", "slope": 40.0, "threshold": 0.001}, "halting": "gate"}
WEIGHTED = {"loop_loss": {"type": "deep_supervision", "window": 2, "decay": 0.5, "chunk_tokens": 4}}
IN_PLACE = {**VARIANTS["sandwich"], "num_coda_layers": 0}  # Ouro's kind
PARITY = {
    "deep": DEEP,
    "deep-window": WEIGHTED,
    "deep-in-place": {**WEIGHTED, **IN_PLACE, "tie_word_embeddings": True},
    "deep-wide": {**DEEP, **VARIANTS["wide"], "final_norm": "after_loops"},
    "deep-truncated": {**DEEP, "backprop_loops": 2, "checkpoint_granularity": "loop"},
    "expected-exit": STAGE_1,
    "expected-exit-in-place": {**STAGE_1, **IN_PLACE},
    "exit-gate": STAGE_2,
}


def labels_of(tokens: Tensor) -> Tensor:
    """Labels of which unequal numbers in each row count."""
    labels = tokens.clone()
    labels[0, :2] = labels[1, 4:] = -100
    return labels


def trained(**settings) -> LoopedForCausalLM:
    """A model in training; where the loss trains the gate alone, with the rest frozen."""
    torch.manual_seed(0)
    model = tiny_model(**{"num_core_layers": 1, **settings}, std=1.0).train()
    if model.config.loop_loss["type"] == "exit_gate":
        model.requires_grad_(False)
        model.model.halting.requires_grad_(True)
    return model


def token_loss(config: LoopedConfig, losses: list[Tensor], p: list[Tensor], stop: list[Tensor], depth: int) -> Tensor:
    """The loss of one token from its equation: cross-entropies, exit distribution and stopping probabilities of loops
    1 … T, of which the token takes part in `depth`.
    """
    spec = config.loop_loss
    if spec["type"] == "deep_supervision":
        window = depth if spec["window"] is None else min(spec["window"], depth)
        w = {t: spec["decay"] ** (depth - t) for t in range(depth - window + 1, depth + 1)}
        return sum(w[t] * losses[t - 1] for t in w) / sum(w.values())
    if spec["type"] == "expected_exit":
        entropy = -sum(q * torch.log(q) for q in p)
        return sum(q * loss for q, loss in zip(p, losses, strict=True)) - spec["entropy_weight"] * entropy
    terms = []
    for t in range(1, len(losses)):
        improvement = max(0.0, (losses[t - 1] - losses[t]).item())
        wanted = 1 / (1 + math.exp(-spec["slope"] * (improvement - spec["threshold"])))
        terms.append(-wanted * torch.log(1 - stop[t]) - (1 - wanted) * torch.log(stop[t]))
    return sum(terms) / len(losses)


def reference_loss(
    model: LoopedForCausalLM, w: dict[str, Tensor], tokens: Tensor, labels: Tensor, depths: Tensor | None = None
) -> Tensor:
    """The loss of a batch, from one run of the naive model for each row and loop, each ending there."""
    config, terms = model.config, []
    read_last = {"type": "none"}  # after each loop its own state is read
    plain = LoopedConfig(**{**config.to_dict(), "halting": read_last, "loop_loss": "output"})
    for row, (ids, wanted) in enumerate(zip(tokens, labels, strict=True)):
        own = torch.full_like(ids, T) if depths is None else depths[row]
        logits = []
        for t in range(1, T + 1):
            k = config.backprop_loops
            kept = None if k is None else max(0, t - (T - k))
            ends = {"num_loops": t} if depths is None else {"depths": own.clamp(max=t)}
            logits.append(reference_logits(w, plain, ids, backprop_loops=kept, **ends))
        trace = reference_trace(w, config, ids, num_loops=T, training=True) if depths is None else None
        for place in range(len(ids) - 1):
            if wanted[place + 1] == -100:
                continue
            losses = [-torch.log_softmax(x[place], dim=-1)[wanted[place + 1]] for x in logits]
            p, stop = [], []
            if config.halting["type"] == "gate":
                p = list(trace.exit_probabilities[place])
                gate = (w["model.halting.weight"][0], w["model.halting.bias"][0])
                stop = [torch.sigmoid(s[place] @ gate[0] + gate[1]) for s in trace.states[1:]]
            terms.append(token_loss(config, losses, p, stop, int(own[place])))
    return torch.stack(terms).mean()


def assert_parity(model: LoopedForCausalLM, depths: Tensor | None = None) -> None:
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    tokens = random_tokens(2, 5)
    labels = labels_of(tokens)
    loss = model(tokens, labels=labels, num_loops=T if depths is None else depths).loss
    expected = reference_loss(model, w, tokens, labels, depths)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        wanted = torch.zeros_like(parameter) if w[name].grad is None else w[name].grad
        allowed = max(2e-3 * wanted.abs().max().item(), 2e-6)
        assert (parameter.grad - wanted).abs().max().item() <= allowed, name


@pytest.mark.parametrize("variant", PARITY)
def test_loss_and_gradients_equal_the_equations(variant):
    model = trained(**PARITY[variant])
    if model.config.backprop_loops is not None:
        model.activation_checkpointing_enable()
    assert_parity(model)


@pytest.mark.parametrize(
    "variant", ["mhc", "hyperloop", "depth_attention", "shared", "lora", "nested", "halting_change"]
)
def test_deep_supervision_is_the_mean_of_the_losses_of_models_that_end_earlier(variant):
    nested = {"schedule": {"type": "nested", "inner_loops": 2}, "injection": "none", "state_init": "input"}
    settings = nested if variant == "nested" else VARIANTS[variant]
    if variant == "halting_change":  # at a threshold of 0 each model is read from its last state
        settings = {"halting": {"type": "state_change", "threshold": 0.0}}
    model, tokens = trained(**DEEP, **settings, num_core_layers=2), random_tokens()
    labels = labels_of(tokens)
    loss = model(tokens, labels=labels).loss
    model.eval()
    expected = [model(tokens, labels=labels, num_loops=t).loss for t in (1, 2, 3)]
    torch.testing.assert_close(loss, sum(expected) / 3)


@pytest.mark.parametrize("backprop_loops", [None, 1])
def test_every_token_is_supervised_within_its_own_depth(backprop_loops):
    depths = torch.tensor([[1, 3, 2, 3, 1], [3, 3, 1, 2, 3]])
    model = trained(**WEIGHTED, backprop_loops=backprop_loops)
    if backprop_loops is None:
        assert_parity(model, depths)
        return
    # a loop without a graph trains coda and head alone, and leaves the value as it is
    tokens = random_tokens(2, 5)
    loss = model(tokens, labels=tokens, num_loops=depths).loss
    model.config.backprop_loops = None
    torch.testing.assert_close(loss, model(tokens, labels=tokens, num_loops=depths).loss)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings", [DEEP, STAGE_1, STAGE_2], ids=["deep", "stage-1", "stage-2"])
def test_logits_and_the_loss_in_evaluation_are_those_of_the_output(settings):
    model, tokens = trained(**settings), random_tokens()
    logits = model(tokens, labels=tokens).logits
    model.eval()
    plain = trained(**{**settings, "loop_loss": "output"}).eval()
    assert torch.equal(model(tokens, labels=tokens).loss, plain(tokens, labels=tokens).loss)
    torch.testing.assert_close(logits, plain(tokens).logits)


@pytest.mark.parametrize("settings", [WEIGHTED, STAGE_1], ids=["deep", "stage-1"])
def test_accumulated_steps_equal_one_large_batch(settings, tmp_path):
    """Batches hold unequal numbers of tokens: only a loss divided by all of them makes the two alike."""
    results = []
    for size, steps in ((8, 1), (2, 4)):
        model = trained(**settings)
        start = weights(model)
        arguments = run_arguments(
            tmp_path / str(size),
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
        Trainer(model, arguments, train_dataset=sentence_dataset(), data_collator=collator).train()
        results.append({name: tensor - start[name] for name, tensor in weights(model).items()})
    assert any(tensor.any() for tensor in results[0].values())
    for name, tensor in results[1].items():
        torch.testing.assert_close(tensor, results[0][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
def test_sampled_depths_train(granularity):
    sampling = {"type": "uniform", "min_loops": 1, "max_loops": 5, "granularity": granularity}
    model, tokens = trained(**DEEP, depth_sampling=sampling, backprop_loops=2), random_tokens(3, 6)
    output = model(tokens, labels=tokens)
    model.model.depth_sampling.step.zero_()
    again = model(tokens, labels=tokens, use_cache=True)
    given = model(tokens, labels=tokens, num_loops=output.num_loops if granularity != "batch" else int(
        output.num_loops[0]))  # fmt: skip
    assert torch.equal(output.loss, again.loss)
    torch.testing.assert_close(output.loss, given.loss)
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_logits_of_supervised_loops_are_never_kept():
    """Only the logits that are returned are as large as the batch; the backward pass keeps none of any loop's."""
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    model, tokens = trained(**WEIGHTED), random_tokens(2, 8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss.requires_grad
    weight = tuple(model.lm_head.weight.T.shape)
    assert [shape for shape in kept if shape[-1:] == (model.config.vocab_size,) and shape != weight] == []


def test_chunks_change_nothing():
    tokens = random_tokens(2, 7)
    values = []
    for chunk in (1, 5, 1000):
        model = trained(loop_loss={"type": "deep_supervision", "chunk_tokens": chunk})
        values.append(model(tokens, labels=labels_of(tokens)).loss)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_a_saturated_gate_leaves_the_gradient_finite():
    model, tokens = trained(**STAGE_1), random_tokens()
    with torch.no_grad():
        model.model.halting.bias.fill_(200.0)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_gate_learns_to_stop_where_loops_do_not_help():
    """With a core that changes nothing no loop improves on the one before, so the wanted probability is to stop."""
    loss = {"type": "exit_gate", "threshold": 0.1}  # wanted: to go on with sigmoid(-5)
    model = trained(halting="gate", loop_loss=loss, loop_update="gated")
    with torch.no_grad():
        model.model.loop_update.gate.fill_(-40.0)
        model.model.halting.bias.fill_(-2.0)
    tokens, optimiser = random_tokens(2, 9), torch.optim.Adam(model.model.halting.parameters(), lr=0.3)
    assert model(tokens).exit_probabilities[..., 0].max() < 0.6
    for _ in range(20):
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    assert model(tokens).exit_probabilities[..., 0].min() > 0.8


def test_a_masked_language_model_reads_labels_in_their_place():
    torch.manual_seed(0)
    config = tiny_config(is_causal=False, mlm_head="transform", **DEEP)
    model, tokens = randomise(LoopedForMaskedLM(config)).train(), random_tokens()
    labels = labels_of(tokens)
    loss = model(tokens, labels=labels).loss
    model.eval()
    expected = [model(tokens, labels=labels, num_loops=t).loss for t in (1, 2, 3)]
    torch.testing.assert_close(loss, sum(expected) / 3)


REFUSED = {
    "act": ({**DEEP, "halting": "act"}, r"loop_loss='deep_supervision' with halting='act'.*'none' or 'state_change'"),
    "router": ({**DEEP, "halting": "token_choice"}, r"loop_loss='deep_supervision' with halting='token_choice'"),
    "gate-unread": ({**DEEP, "halting": "gate"}, r"loop_loss='deep_supervision' with halting='gate'"),
    "no-gate": ({"loop_loss": "expected_exit"}, r"loop_loss='expected_exit' with halting='none'.*halting='gate'"),
    "groups": (
        {**DEEP, "core_group_size": 1, "injection": "none", "state_init": "input"},
        r"loop_loss='deep_supervision' with core_group_size=1",
    ),
    "truncated-gate": ({**STAGE_1, "backprop_loops": 1}, r"backprop_loops=1 with loop_loss='expected_exit'"),
    "truncated-stage-2": ({**STAGE_2, "backprop_loops": 3}, r"backprop_loops=3 with loop_loss='exit_gate'"),
    "no-core": ({**DEEP, "num_core_layers": 0}, r"loop_loss='deep_supervision' acts on the core"),
    "window": ({"loop_loss": {"type": "deep_supervision", "window": 0}}, r"loop_loss: type .*window=0 must be"),
    "decay": ({"loop_loss": {"type": "deep_supervision", "decay": 1.5}}, r"decay=1.5 must lie in \(0, 1\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name(case):
    settings, message = REFUSED[case]
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        tiny_config(**settings)


def test_what_a_call_cannot_do_is_refused_by_name():
    model, tokens = trained(**DEEP), random_tokens()
    with pytest.raises(ValueError, match=r"loop_loss='deep_supervision' with past_key_values"):
        model(tokens, labels=tokens, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"loop_loss='deep_supervision' with output_hidden_states"):
        model(tokens, labels=tokens, output_hidden_states=True)
    gate = tiny_model(**STAGE_2).train()
    with pytest.raises(ValueError, match=r"exit_gate' trains the gate alone, and \d+ other parameters.*embed_tokens"):
        gate(tokens, labels=tokens)


def test_a_distilled_student_must_not_have_a_loss_of_its_own(tmp_path):
    with pytest.raises(ValueError, match=r"loop_loss='deep_supervision' replaces the loss"):
        DistillationTrainer(tiny_model(**DEEP), tiny_model())


def test_a_training_forward_that_computes_another_loss_says_so_once(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_looped.inputs.logger, "warning_once", said.append)
    model = trained(**DEEP)
    model(random_tokens(), labels=random_tokens())
    model.eval()(random_tokens())
    assert said == []
    model.train()(random_tokens())
    assert "loop_loss='deep_supervision' has no effect" in said[0]
    base = LoopedModel(tiny_config()).train()
    base(random_tokens())
    assert len(said) == 1
