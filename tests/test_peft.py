"""PEFT: it keeps a copy of a norm for every adapter, and the KL divergence is that of the copies in use."""

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import klnorm
from klnorm import KLLayerNorm, kl_divergence, kl_layers

LORA = {"bert": ["query", "word_embeddings"], "gpt2": ["c_attn", "wte"]}  # an embedding takes other wrapping
NORMS = {"bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"]}  # by the ends of their names
TUNED = {"bert": 3, "gpt2": 2}  # how many norms these are, out of three
X = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def base_model(kind):
    """A model of one block and three KL layers, the same at every call, its posteriors off their priors."""
    torch.manual_seed(1)
    if kind == "bert":
        config = BertConfig(
            vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        )
        model = BertModel(config, add_pooling_layer=False)
    else:
        model = GPT2Model(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    return scramble(klnorm.replace_layer_norm(model))


def scramble(model):
    """Every KL layer, each copy of it too, somewhere else."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, KLLayerNorm):
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def lora(kind, norms=True):
    return peft.LoraConfig(r=2, target_modules=LORA[kind], modules_to_save=NORMS[kind] if norms else None)


def ln_tuning(kind):
    return peft.LNTuningConfig(target_modules=NORMS[kind])


CONFIGS = pytest.mark.parametrize("config", [lora, ln_tuning], ids=["modules_to_save", "ln_tuning"])
KINDS = pytest.mark.parametrize("kind", ["bert", "gpt2"])


def copies(model, adapter=None):
    """The copies made for an adapter, or the wrapped originals, by name."""
    if adapter is None:
        ends = (".original_module", ".base_layer")
    else:
        ends = (f".modules_to_save.{adapter}", f".ln_tuning_layers.{adapter}")
    return {n: m for n, m in model.named_modules() if isinstance(m, KLLayerNorm) and n.endswith(ends)}


def untouched(model):
    """The KL layers that PEFT has not wrapped, by name."""
    parts = {"original_module", "base_layer", "modules_to_save", "ln_tuning_layers"}
    return {n: m for n, m in model.named_modules() if isinstance(m, KLLayerNorm) and not parts & set(n.split("."))}


def assert_counts(model, *expected):
    """`kl_layers` gives exactly these layers, and `kl_divergence` their sum, in the closed form and in training."""
    expected = {name: layer for group in expected for name, layer in group.items()}
    found = kl_layers(model)
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in found)
    by_hand = sum(layer.kl_divergence() for layer in expected.values()).item()
    assert kl_divergence(model).item() == pytest.approx(by_hand, rel=1e-6)
    model.train()
    y = model(X).last_hidden_state
    assert kl_divergence(model).item() == pytest.approx(by_hand, rel=1e-6)
    assert y.isfinite().all()


@KINDS
def test_lora_alone_leaves_the_frozen_norms(kind):
    base = base_model(kind)
    before = kl_divergence(base).item()
    model = peft.get_peft_model(base, lora(kind, norms=False))
    assert sum(name.endswith("base_layer") for name, _ in model.named_modules()) == len(LORA[kind])
    assert_counts(model, untouched(model))
    assert len(kl_layers(model)) == 3
    assert kl_divergence(model).item() == pytest.approx(before, rel=1e-6)
    (model(X).last_hidden_state.square().sum() + kl_divergence(model)).backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


@KINDS
@CONFIGS
def test_the_copy_is_counted_and_trained_once(kind, config):
    model = scramble(peft.get_peft_model(base_model(kind), config(kind)))
    assert len(copies(model, "default")) == TUNED[kind]
    assert_counts(model, copies(model, "default"), untouched(model))
    trained = {f"{n}.{k}": p for n, layer in copies(model, "default").items() for k, p in layer.named_parameters()}
    kl_grads = torch.autograd.grad(sum(m.kl_divergence() for m in copies(model, "default").values()), trained.values())

    def backward(kl_weight):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(X).last_hidden_state.square().mean()
        (loss + kl_weight * kl_divergence(model)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    data, both = backward(0.0), backward(0.1)
    assert trained.keys() <= both.keys()
    for (name, _), kl_grad in zip(trained.items(), kl_grads, strict=True):
        torch.testing.assert_close(both[name], data[name] + 0.1 * kl_grad, rtol=1e-5, atol=1e-6, msg=name)
        assert (data[name] != 0).any()
        assert (kl_grad != 0).all()
    frozen = {**copies(model), **untouched(model)}
    assert all(p.grad is None for layer in frozen.values() for p in layer.parameters())


@KINDS
@CONFIGS
def test_norms_replaced_after_wrapping(kind, config):
    model = klnorm.restore_layer_norm(base_model(kind))
    model = klnorm.replace_layer_norm(peft.get_peft_model(model, config(kind)))
    scramble(model)
    assert_counts(model, copies(model, "default"), untouched(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {f"{n}.{k}" for n, m in copies(model, "default").items() for k, _ in m.named_parameters()}


@KINDS
@CONFIGS
def test_the_active_adapter_of_two_counts(kind, config):
    model = peft.get_peft_model(base_model(kind), config(kind), adapter_name="one")
    model.add_adapter("two", config(kind))
    scramble(model)
    values = set()
    for adapter in "one", "two", "one":
        model.set_adapter(adapter)
        assert_counts(model, copies(model, adapter), untouched(model))
        values.add(kl_divergence(model).item())
    assert len(values) == 2
    with model.disable_adapter():
        assert_counts(model, copies(model), untouched(model))
    assert_counts(model, copies(model, "one"), untouched(model))
    assert kl_divergence(model).requires_grad


def test_trainable_tokens_leave_the_norms():
    config = peft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[1, 2])
    model = peft.get_peft_model(base_model("bert"), config)
    assert_counts(model, untouched(model))
    assert len(kl_layers(model)) == 3


def test_an_adapter_that_adds_to_its_layer_leaves_the_norms_in_it():
    """LoRA of a module of one's own: it is wrapped as a norm is, but goes on being used."""
    model = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(8, 8), "norm": KLLayerNorm(8)}))
    wrapper = peft.tuners.lora.Linear(model[0]["inner"], "default", r=2, config=peft.LoraConfig(r=2))
    wrapper.base_layer = model[0]
    assert list(kl_layers(nn.Sequential(wrapper))) == ["0.base_layer.norm"]


def test_the_originals_count_for_an_adapter_without_copies():
    model = peft.get_peft_model(base_model("bert"), lora("bert"), adapter_name="one")
    model.add_adapter("two", lora("bert", norms=False))
    scramble(model)
    model.set_adapter("two")
    assert_counts(model, copies(model))
    model.set_adapter("one")
    assert_counts(model, copies(model, "one"))


@KINDS
@CONFIGS
def test_the_merged_model_works_as_one_without_adapters(kind, config):
    model = scramble(peft.get_peft_model(base_model(kind), config(kind)))
    expected = {n.split("base_model.model.")[1]: m for n, m in kl_layers(model).items()}
    y, kl = model.eval()(X).last_hidden_state, kl_divergence(model).item()
    merged = model.merge_and_unload()
    # LoRA's product is added to its weight instead of its output: another rounding
    torch.testing.assert_close(merged.eval()(X).last_hidden_state, y, rtol=1e-5, atol=1e-5)
    assert [id(m) for m in kl_layers(merged).values()] == [id(m) for m in expected.values()]
    assert kl_divergence(merged).item() == pytest.approx(kl, rel=1e-6)
    assert sum(isinstance(m, KLLayerNorm) for m in merged.modules()) == 3
    merged.train().requires_grad_(True)
    (merged(X).last_hidden_state.square().sum() + kl_divergence(merged)).backward()
    assert all((p.grad != 0).any() for layer in kl_layers(merged).values() for p in layer.parameters())


@KINDS
def test_a_copy_merged_in_place_counts(kind):
    model = scramble(peft.get_peft_model(base_model(kind), ln_tuning(kind)))
    layers, kl = list(kl_layers(model).values()), kl_divergence(model).item()
    model.merge_adapter()
    assert [id(m) for m in kl_layers(model).values()] == [id(m) for m in layers]
    assert kl_divergence(model).item() == pytest.approx(kl, rel=1e-6)
    model.unmerge_adapter()
    assert_counts(model, copies(model, "default"), untouched(model))


@KINDS
@CONFIGS
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saved_copies_come_back_bit_for_bit(kind, config, low_memory, tmp_path):
    model = peft.get_peft_model(base_model(kind), config(kind))
    for copy in copies(model, "default").values():
        scramble(copy)
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    y = model.eval()(X).last_hidden_state
    model.save_pretrained(tmp_path)

    torch.manual_seed(8)
    loaded = peft.PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True, low_cpu_mem_usage=low_memory)
    state = loaded.state_dict()
    kept = [f"{n}.{k}" for n, layer in copies(model, "default").items() for k in layer.state_dict()]
    assert len(kept) == 6 * TUNED[kind]
    for name in kept:
        assert torch.equal(state[name], saved[name]), name
    assert torch.equal(loaded.eval()(X).last_hidden_state, y)
    assert kl_divergence(loaded).item() == kl_divergence(model).item()
    assert_counts(loaded, copies(loaded, "default"), untouched(loaded))
