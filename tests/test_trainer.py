"""`klnorm.integrations.transformers`: the KL in Hugging Face's Trainer, against loops written by hand."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from klnorm import KLLayerNorm, kl_divergence, replace_layer_norm, restore_layer_norm
from klnorm.integrations.transformers import KLTrainer, KLTrainerMixin
from klnorm.training import KLWeight, param_groups

SMOOTHING = 0.2
LR, RHO_LR = 0.05, 0.5


def tiny_bert(**options):
    """A replaced BERT, posteriors off their priors."""
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return replaced(BertForSequenceClassification(config), **options)


def tiny_gpt2(**options):
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return replaced(GPT2LMHeadModel(config), **options)


def replaced(model, **options):
    replace_layer_norm(model, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def repeatable(build):
    """fp64, and with one draw a forward, the same in each: all micro-batches see the function the whole batch sees."""
    generator = torch.Generator()
    model = build(noise="batch", generator=generator).double()
    model.register_forward_pre_hook(lambda *_: generator.manual_seed(5) and None)
    return model


def examples(count):
    return [{"input_ids": torch.randint(11, (4,)), "labels": int(torch.randint(3, ()))} for _ in range(count)]


def texts(count):
    """For a language model; the micro-batches differ in the number of tokens to predict."""
    made = [{"input_ids": torch.randint(11, (4,))} for _ in range(count)]
    return [
        {**text, "labels": text["input_ids"].clone().index_fill_(0, torch.arange(1 + i % 3), -100)}
        for i, text in enumerate(made)
    ]


def arguments(folder, **options):
    options = {
        "learning_rate": LR, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "num_train_epochs": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    return TrainingArguments(str(folder), **options)


def data_loss(model, batch, **options):
    """The mean over the examples, or tokens, of a batch."""
    logits = model(input_ids=torch.stack([example["input_ids"] for example in batch])).logits
    labels = torch.stack([torch.as_tensor(example["labels"]) for example in batch])
    if labels.dim() == 2:  # a language model: every position predicts the next
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, **options)


def train_by_hand(model, batches, kl_weight, **loss_options):
    """Whole batches, one optimizer step each; returns what Trainer logs."""
    optimizer = torch.optim.SGD(param_groups(model, LR, rho_lr=RHO_LR, weight_decay=0.0))
    logs = []
    for batch in batches:
        model.train()
        loss = data_loss(model, batch, **loss_options)
        kl = kl_divergence(model)
        loss = loss + kl_weight.value * kl
        logs.append({"loss": loss.item(), "kl": kl.item(), "kl_weight": kl_weight.value})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kl_weight.step()
    return logs


def assert_same_parameters(found, expected, tolerance=1e-9):
    expected = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=tolerance, atol=tolerance / 100, msg=name)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class OwnLoss(Trainer):
    """A subclass that computes a mean over the micro-batch, as most did before `num_items_in_batch`."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OwnLossWithKL(KLTrainerMixin, OwnLoss):
    pass


def own_loss_function(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def tiny_bert_of_means(**options):
    """Says that its loss is a mean over the micro-batch, which BertForSequenceClassification does not say by itself."""
    model = tiny_bert(**options)
    model.accepts_loss_kwargs = False
    return model


# Trainer class and options, model, data, arguments of the loss by hand, tolerance: sums of 32 terms in another order
# and three steps, in fp64, or in fp32 where transformers computes a loss in fp32.
LOSSES = {
    "num_items_in_batch": (KLTrainer, {}, tiny_gpt2, texts, {}, 1e-5),
    "mean of the micro-batch": (KLTrainer, {}, tiny_bert_of_means, examples, {}, 1e-9),
    "label smoothing": (KLTrainer, {}, tiny_bert, examples, {"label_smoothing": SMOOTHING}, 1e-5),
    "compute_loss_func": (KLTrainer, {"compute_loss_func": own_loss_function}, tiny_bert_of_means, examples, {}, 1e-9),
    "compute_loss": (OwnLossWithKL, {}, tiny_bert, examples, {}, 1e-9),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_that_of_a_loop_by_hand(tmp_path, loss, accumulation):
    cls, options, build, data, loss_options, tolerance = LOSSES[loss]
    by_hand, model, data = repeatable(build), repeatable(build), data(96)
    model.load_state_dict(by_hand.state_dict())
    before = copy.deepcopy(model.state_dict())
    training_arguments = arguments(
        tmp_path,
        per_device_train_batch_size=32 // accumulation,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=loss_options.get("label_smoothing", 0.0),
    )
    weight = {"num_examples": 96, "warmup_steps": 2}
    trainer = cls(model, training_arguments, train_dataset=data, kl_weight=KLWeight(**weight), rho_lr=RHO_LR, **options)
    trainer.train()
    logs = train_by_hand(by_hand, [data[i : i + 32] for i in (0, 32, 64)], KLWeight(**weight), **loss_options)
    assert_same_parameters(model, by_hand, tolerance)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if "rho" in name)
    assert trainer.kl_weight.steps == 3
    for found, expected in zip(training_logs(trainer), logs, strict=True):
        assert found["kl_weight"] == expected["kl_weight"]
        assert found["kl"] == pytest.approx(expected["kl"], rel=tolerance)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # Trainer sums it in fp32


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    by_hand, model = repeatable(tiny_gpt2), repeatable(tiny_gpt2)
    model.load_state_dict(by_hand.state_dict())
    data = texts(24)  # three micro-batches of 8: two, and one
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    KLTrainer(model, arguments(tmp_path, **options), train_dataset=data, rho_lr=RHO_LR).train()
    train_by_hand(by_hand, [data[:16], data[16:]], KLWeight(num_examples=24))
    assert_same_parameters(model, by_hand, 1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_kl_counts_once_whatever_becomes_of_the_loss(tmp_path, accumulation):
    """A head that takes `num_items_in_batch` and ignores it has Trainer multiply its loss: the KL it does not."""
    model = tiny_bert(init_std=0.1).double()
    norms = [module for module in model.modules() if isinstance(module, KLLayerNorm)]
    with torch.no_grad():
        for norm in norms:  # no noise to speak of, so that nothing but the KL moves rho
            norm.weight_rho.fill_(-40)
            norm.bias_rho.fill_(-40)
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    KLTrainer(model, arguments(tmp_path, **options), train_dataset=examples(8), rho_lr=RHO_LR).train()
    for norm in norms:
        # d KL / d rho = -sigmoid(rho) / softplus(rho), -1 in the limit
        expected = torch.full_like(norm.weight, -40 + RHO_LR / 8)
        torch.testing.assert_close(norm.weight_rho, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(norm.bias_rho, expected, rtol=1e-12, atol=0)


def test_evaluation_has_no_kl(tmp_path):
    model, data = tiny_bert(), examples(8)
    options = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = KLTrainer(model, arguments(tmp_path, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    found = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(data_loss(model, data).item(), rel=1e-5)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert not any("kl" in entry for entry in evaluations)
    assert trainer.kl_weight.steps == 2


def test_resuming_continues_bit_for_bit(tmp_path):
    data, start = examples(24), tiny_bert()

    def train(**options):
        trainer = KLTrainer(
            copy.deepcopy(start),
            arguments(
                tmp_path,
                optim="adamw_torch",
                train_sampling_strategy="random",
                per_device_train_batch_size=4,
                save_strategy="steps",
                save_steps=2,
            ),
            train_dataset=data,
            kl_weight=KLWeight(per_parameter=start, warmup_steps=10),
        )
        trainer.train(**options)
        return trainer

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.kl_weight.steps == resumed.kl_weight.steps == 6
    logs = training_logs(resumed)
    # 3 norms of 8 scales and shifts
    assert [entry["kl_weight"] for entry in logs] == pytest.approx([step / 10 / 48 for step in range(6)], rel=1e-14)
    timeless = [{key: entry[key] for key in ("loss", "kl", "kl_weight", "grad_norm")} for entry in logs]
    assert timeless == [{key: entry[key] for key in timeless[0]} for entry in training_logs(whole)]
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    assert not torch.equal(state["bert.embeddings.LayerNorm.weight_rho"], start.bert.embeddings.LayerNorm.weight_rho)


# The optimizer


def named_groups(trainer):
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {
        group["name"]: ({names[p] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
    }


def test_the_optimizer_has_the_rates_of_the_arguments_and_decays_what_trainer_decays(tmp_path):
    model = tiny_bert()
    trainer = KLTrainer(model, arguments(tmp_path, optim="adamw_torch", weight_decay=0.1), rho_lr=3e-3)
    trainer.create_optimizer()
    assert type(trainer.optimizer) is torch.optim.AdamW
    decayed = set(trainer.get_decay_parameter_names(model))
    rho = {name for name, _ in model.named_parameters() if name.endswith("_rho")}
    rest = {name for name, _ in model.named_parameters()} - decayed - rho
    assert len(rho) == 6
    assert len(decayed) > 6
    assert named_groups(trainer) == {"decay": (decayed, LR, 0.1), "no_decay": (rest, LR, 0.0), "rho": (rho, 3e-3, 0.0)}
    assert trainer.optimizer_cls_and_kwargs is None


def test_the_scheduler_scales_every_group(tmp_path):
    options = {"per_device_train_batch_size": 2, "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = KLTrainer(tiny_bert(), arguments(tmp_path, **options), train_dataset=examples(8), rho_lr=RHO_LR)
    rates = []
    step = KLTrainer.training_step

    def recording_step(*args):
        rates.append({group["name"]: group["lr"] for group in trainer.optimizer.param_groups})
        return step(trainer, *args)

    trainer.training_step = recording_step
    trainer.train()
    assert [rate["rho"] for rate in rates] == pytest.approx([RHO_LR * left / 4 for left in (4, 3, 2, 1)])
    assert [rate["decay"] for rate in rates] == pytest.approx([LR * left / 4 for left in (4, 3, 2, 1)])
    # the rate that Trainer logs is that of the first group, which is not rho
    assert training_logs(trainer)[0]["learning_rate"] == pytest.approx(LR)


def test_a_given_optimizer_is_left_alone(tmp_path):
    model = tiny_bert()
    given = torch.optim.SGD(model.parameters(), lr=0.3)
    trainer = KLTrainer(model, arguments(tmp_path), optimizers=(given, None))
    assert trainer.create_optimizer() is given
    assert [group["lr"] for group in given.param_groups] == [0.3]


def test_a_given_optimizer_class_gets_the_groups(tmp_path):
    given = (torch.optim.Adamax, {"lr": 0.2, "eps": 1e-3})
    trainer = KLTrainer(tiny_bert(), arguments(tmp_path), optimizer_cls_and_kwargs=given, rho_lr=0.4)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adamax
    assert [(g["name"], g["lr"], g["eps"]) for g in optimizer.param_groups] == [
        ("decay", 0.2, 1e-3), ("no_decay", 0.2, 1e-3), ("rho", 0.4, 1e-3)
    ]  # fmt: skip
    assert trainer.optimizer_cls_and_kwargs == given == (torch.optim.Adamax, {"lr": 0.2, "eps": 1e-3})


# What is wrong


@pytest.mark.parametrize("given", [(torch.optim.SGD, {"params": []}), (lambda: None, {})], ids=["groups", "factory"])
def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path, given):
    trainer = KLTrainer(tiny_bert(), arguments(tmp_path), optimizer_cls_and_kwargs=given)
    with pytest.raises(ValueError, match=r"comes with groups of its own.*Remedy: pass optimizers=\(optimizer, None\)"):
        trainer.create_optimizer()
    model, train_set = tiny_bert(), examples(4)
    optimizer = torch.optim.SGD(param_groups(model, lr=LR, rho_lr=RHO_LR))
    trainer = KLTrainer(model, arguments(tmp_path), optimizers=(optimizer, None), train_dataset=train_set)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name.endswith("_rho"))


def test_a_data_set_without_length_needs_a_weight(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(8))

    options = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"kl_weight is None and train_dataset has no length.*Remedy"):
        KLTrainer(tiny_bert(), options, train_dataset=Stream()).train()
    trainer = KLTrainer(tiny_bert(), options, train_dataset=Stream(), kl_weight=KLWeight(num_examples=8))
    trainer.train()
    assert [entry["kl_weight"] for entry in training_logs(trainer)] == [1 / 8] * 2


def test_a_model_without_kl_layers_is_evaluated_but_not_trained(tmp_path):
    trained = examples(4)
    trainer = KLTrainer(restore_layer_norm(tiny_bert()), arguments(tmp_path), train_dataset=trained)
    assert trainer.evaluate(trained)["eval_loss"] > 0
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"model has no KL layer.*would be 0.*Remedy: klnorm\.replace_layer_norm"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    replace_layer_norm(trainer.model)  # the remedy
    trainer.train()
    assert training_logs(trainer)[0]["kl"] > 0


def test_the_kl_layers_of_a_peft_model_and_of_model_init_are_found(tmp_path):
    wrapped = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"]))
    for given in {"model": wrapped}, {"model_init": lambda: tiny_bert()}:
        trainer = KLTrainer(args=arguments(tmp_path), train_dataset=examples(4), **given)
        trainer.train()
        assert training_logs(trainer)[0]["kl"] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"kl_weight": 0.1},
            TypeError,
            r"kl_weight is a float.*Remedy: klnorm\.KLWeight\(num_examples=len\(train_data",
        ),
        ({"rho_lr": 10**400}, ValueError, "rho_lr is 1000000.*, expected a finite number above 0"),
        ({"rho_lr": 0.0}, ValueError, "rho_lr is 0.0, expected a finite number above 0"),
    ],
)
def test_the_mixin_explains_what_is_wrong(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        KLTrainer(tiny_bert(), arguments(tmp_path), **options)


def test_the_weight_that_is_advised(tmp_path):
    train_dataset = examples(4)
    kl_weight = KLWeight(num_examples=len(train_dataset))
    trainer = KLTrainer(tiny_bert(), arguments(tmp_path), train_dataset=train_dataset, kl_weight=kl_weight)
    trainer.train()
    assert training_logs(trainer)[-1]["kl_weight"] == 1 / 4
