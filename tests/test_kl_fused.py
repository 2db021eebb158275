"""In real training the KL divergence is the forward's own: nothing is computed of the parameters again."""

import peft
import pytest
import torch
from bert_training import bert, checkpointed, loss_of, new_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import klnorm
from klnorm import kl
from klnorm.integrations.transformers import KLTrainer


@pytest.fixture
def computed(monkeypatch):
    """A list that gets the number of closed forms that every KL divergence computes."""
    counts, closed_form = [], kl.closed_form

    def counting(terms):
        counts.append(len(terms))
        return closed_form(terms)

    monkeypatch.setattr(kl, "closed_form", counting)
    return counts


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(device, computed, dtype, stream):
    model, batch = bert(device, stream), new_batch(device)
    for _ in range(3):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = loss_of(model, batch)
        loss.backward()
    assert computed == [0, 0, 0]


def test_under_gradient_accumulation(device, computed):
    model, batches = bert(device), [new_batch(device) for _ in range(4)]
    for batch in batches:
        (loss_of(model, batch) / 4).backward()
    assert computed == [0] * 4


def test_under_activation_checkpointing(device, computed):
    model, batch = checkpointed(bert(device, num_hidden_layers=2), False), new_batch(device)
    for _ in range(3):
        loss_of(model, batch).backward()
    assert computed == [0, 0, 0]


def test_of_pefts_copies(device, computed):
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["LayerNorm"])
    model, batch = peft.get_peft_model(bert(device), config).to(device), new_batch(device)
    loss_of(model, batch).backward()
    assert computed == [0]


def test_under_distributed_data_parallel(device, computed, tmp_path):
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = DistributedDataParallel(bert(device)), new_batch(device)
        for _ in range(2):
            loss_of(model, batch).backward()
        del model  # if it outlives its group, it can wait for gloo's thread for ever
    finally:
        torch.distributed.destroy_process_group()
    assert computed == [0, 0]


def test_in_trainer(computed, tmp_path):
    model = bert("cpu", torch.float32)
    model.accepts_loss_kwargs = False
    data = [{"input_ids": torch.arange(3, 7), "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, bf16=True,
    )  # fmt: skip
    KLTrainer(model, arguments, train_dataset=data).train()
    assert computed == [0] * 4


def test_of_the_last_layer_of_a_model(device, computed):
    model = klnorm.replace_layer_norm(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(torch.randn(3, 4, device=device)).sum() + klnorm.kl_divergence(model)
    loss.backward()
    assert computed == [0]
