"""`klnorm.replace_rms_norm` with the real transformers: models whose RMSNorm classes are their own."""

import copy

import pytest
import torch
from hf_models import (
    EAGER,
    VOCABULARY,
    assert_same_state,
    evaluated,
    load,
    output,
    replaced_class,
    sampled,
    token_ids,
    train,
    transformers,
)
from hf_own_norms import DECODER, Family, new_model, norms

import klnorm

T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    **EAGER,
}


FAMILIES = {
    "llama": Family(transformers.LlamaModel, DECODER, "LlamaRMSNorm", 5, 1.0),
    "mistral": Family(transformers.MistralModel, DECODER, "MistralRMSNorm", 5, 1.0),
    "qwen2": Family(transformers.Qwen2Model, DECODER, "Qwen2RMSNorm", 5, 1.0),
    "qwen3": Family(transformers.Qwen3Model, DECODER, "Qwen3RMSNorm", 9, 1.0),  # queries and keys too
    "gemma": Family(transformers.GemmaModel, DECODER, "GemmaRMSNorm", 5, 0.0),
    "gemma2": Family(transformers.Gemma2Model, DECODER, "Gemma2RMSNorm", 9, 0.0),
    "t5": Family(transformers.T5EncoderModel, T5, "T5LayerNorm", 5, 1.0),
}


def families(*names):
    return pytest.mark.parametrize("family", [FAMILIES[name] for name in names], ids=names)


every_family = families(*FAMILIES)


@every_family
def test_replaced_trained_and_restored(device, family):
    model, inputs = new_model(family, device), token_ids(device)
    plain, before, types = copy.deepcopy(model), evaluated(model, inputs), [type(m) for m in model.modules()]
    expected = norms(model, family)
    assert len(expected) == family.norms
    klnorm.replace_rms_norm(model)
    layers = klnorm.kl_layers(model)
    assert layers == expected
    assert {type(layer).__name__ for layer in layers.values()} == {f"KL{family.norm}"}
    assert torch.equal(evaluated(model, inputs), before)
    assert not torch.isclose(sampled(model, inputs), before).all()

    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    for name, layer in layers.items():
        for key, start in ("weight", plain.get_submodule(name).weight), ("weight_rho", -2.9702):
            moved = (getattr(layer, key) - start).abs()  # softplus(-2.9702) = 0.05
            # Adam's step is its learning rate, 1e-2 here, for whatever gradient is not 0.
            assert (moved > 1e-3).float().mean() > 0.5, f"{name}.{key}"

    trained = evaluated(model, inputs)
    assert not torch.isclose(trained, before).all()
    klnorm.restore_rms_norm(model)
    assert [type(m) for m in model.modules()] == types
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    assert torch.equal(evaluated(model, inputs), trained)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(evaluated(plain, inputs), trained)


@every_family
def test_gradients_reach_both_parameters(device, family):
    model, inputs = klnorm.replace_rms_norm(new_model(family, device)), token_ids(device)
    torch.manual_seed(0)
    y = output(model.train(), inputs)
    ((y * torch.randn_like(y)).sum() + klnorm.kl_divergence(model)).backward()
    for name, layer in klnorm.kl_layers(model).items():
        for key, parameter in layer.named_parameters():
            assert parameter.grad.isfinite().all(), f"{name}.{key}"
            assert parameter.grad.all(), f"{name}.{key}"


@every_family
def test_saved_and_loaded(device, family, tmp_path):
    model, inputs = klnorm.replace_rms_norm(new_model(family, device)), token_ids(device)
    train(model, inputs, steps=1)
    with torch.no_grad():
        for layer in klnorm.kl_layers(model).values():
            layer.weight_prior.add_(0.1)
    model.save_pretrained(tmp_path)
    again, info = load(replaced_class(family.model, klnorm.replace_rms_norm), tmp_path, output_loading_info=True)
    assert not any(info.values())
    again.to(device)
    assert_same_state(again, model)
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    assert torch.equal(sampled(again, inputs), sampled(model, inputs))
    vanilla = load(family.model, tmp_path).to(device)
    assert torch.equal(evaluated(vanilla, inputs), evaluated(model, inputs))


@every_family
@pytest.mark.parametrize("prior", ["current", "standard"])
def test_a_vanilla_checkpoint_in_a_class_with_kl_layers_leaves_nothing_uninitialized(device, family, prior, tmp_path):
    plain, inputs = new_model(family, device), token_ids(device)
    plain.save_pretrained(tmp_path)
    model = load(replaced_class(family.model, klnorm.replace_rms_norm, init_std=0.2, prior=prior), tmp_path).to(device)
    assert torch.equal(evaluated(model, inputs), evaluated(plain, inputs))
    for name, layer in klnorm.kl_layers(model).items():
        weight = plain.get_submodule(name).weight
        assert torch.equal(layer.weight, weight)
        standard = torch.full_like(weight, family.weight_of_1)
        assert torch.equal(layer.weight_prior, weight if prior == "current" else standard)
        torch.testing.assert_close(layer.weight_rho, torch.full_like(weight, 0.2).expm1().log())


@every_family
def test_norms_that_a_checkpoint_lacks_are_those_of_a_new_model(family, tmp_path):
    plain = new_model(family)
    state = {
        key: value for key, value in plain.state_dict().items() if key.rpartition(".")[0] not in norms(plain, family)
    }
    plain.save_pretrained(tmp_path, state_dict=state)
    model = load(replaced_class(family.model, klnorm.replace_rms_norm), tmp_path)
    for layer in klnorm.kl_layers(model).values():
        expected = torch.full_like(layer.weight, family.weight_of_1)
        assert torch.equal(layer.weight, expected)
        assert torch.equal(layer.weight_prior, expected)
        torch.testing.assert_close(layer.weight_rho, torch.full_like(expected, 0.05).expm1().log())


@families("llama", "gemma")
def test_bf16_evaluation_is_bit_for_bit_and_training_has_the_dtype(device, family):
    model, inputs = new_model(family, device).bfloat16(), token_ids(device)
    before = evaluated(model, inputs)
    klnorm.replace_rms_norm(model)
    assert torch.equal(evaluated(model, inputs), before)
    assert sampled(model, inputs).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@families("llama", "gemma2", "t5")
def test_the_deterministic_reading_adds_no_parameter(device, family):
    model, inputs = new_model(family, device), token_ids(device)
    before, parameters = evaluated(model, inputs), dict(model.named_parameters())
    klnorm.replace_rms_norm(model, posterior="deterministic", prior_std=1.0)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    # scales near 1 are 1.0 of the prior's deviation: KL of about (scale - 1)^2 each, 0.2^2 on average
    assert 0 < klnorm.kl_divergence(model).item() / klnorm.KLWeight(per_parameter=model).value ** -1 < 0.2
    # the operator's order of additions is another; the last norm ends in values of up to 4
    torch.testing.assert_close(sampled(model, inputs), before, rtol=1e-4, atol=1e-4)
    losses = train(model, inputs)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("filter_fn", [None, lambda module, name: True])
def test_a_layer_norm_without_bias_is_no_rms_norm(filter_fn):
    """Cohere's norms subtract the mean."""
    model = new_model(FAMILIES["llama"], model_class=transformers.CohereModel)
    with pytest.warns(UserWarning, match=r"found no RMSNorm .* it has 3 CohereLayerNorm.*klnorm\.replace_layer_norm"):
        klnorm.replace_rms_norm(model, filter_fn=filter_fn)


def test_the_norms_of_queries_and_keys_can_be_left_out():
    model = new_model(FAMILIES["qwen3"])
    klnorm.replace_rms_norm(model, filter_fn=lambda module, name: "self_attn" not in name)
    assert sorted({name.rpartition(".")[2] for name in klnorm.kl_layers(model)}) == [
        "input_layernorm", "norm", "post_attention_layernorm",
    ]  # fmt: skip


def test_generation_is_unchanged(device):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).to(device).eval()
    ids = token_ids(device)["input_ids"]
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(klnorm.replace_rms_norm(model).generate(ids, max_new_tokens=4, do_sample=False), before)


def test_peft_trains_a_copy_of_a_replaced_norm(device):
    peft = pytest.importorskip("peft")
    model, inputs = klnorm.replace_rms_norm(new_model(FAMILIES["gemma"], device)), token_ids(device)
    before, kinds = evaluated(model, inputs), [type(layer) for layer in norms(model, FAMILIES["gemma"]).values()]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    assert torch.equal(evaluated(adapted, inputs), before)
    layers = klnorm.kl_layers(adapted)
    assert {name.rpartition("modules_to_save.")[2] for name in layers} == {"default"}
    assert [type(layer) for layer in layers.values()] == kinds
    train(adapted, inputs)
    trained = evaluated(adapted, inputs)
    assert not torch.equal(trained, before)
    assert torch.equal(evaluated(klnorm.restore_rms_norm(adapted), inputs), trained)
    assert klnorm.kl_layers(adapted) == {}
