"""torch.compile of a whole model with the KL divergence in its loss; of the operators alone: tests/test_ops.py."""

import pytest
import torch
from bert_training import assert_close, bert, checkpointed, gradients_of, loss_of, new_batch
from torch._dynamo.utils import counters

# torch's own warning, while it compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
ROUNDING = 1e-11  # of fp64, in sums of some hundred terms that a compiler may order anew


def train_compiled(compiled, model, batches):
    """Steps on gradients equal to those of eager for the same seeds; the first call alone compiles, one graph."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counters.clear()
    for step, batch in enumerate(batches):
        expected = gradients_of(loss_of, model, batch, seed=step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            found = gradients_of(compiled, model, batch, seed=step)
        assert_close(found, expected, ROUNDING)
        assert (found["bert.embeddings.LayerNorm.weight_rho"] != 0).all()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("inductor")
def test_bert_under_inductor(device):
    """As a user compiles it, without an option. No dropout: inductor's draws otherwise than eager's."""
    model = bert(device, attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    train_compiled(torch.compile(loss_of), model, [new_batch(device) for _ in range(3)])


def test_bert_as_one_graph(device):
    model = bert(device)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    train_compiled(compiled, model, [new_batch(device) for _ in range(3)])


def test_bert_of_any_batch_size_and_length_in_one_dynamic_graph(device):
    model = bert(device)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    train_compiled(compiled, model, [new_batch(device, *size) for size in ((4, 6), (7, 6), (5, 9), (13, 11))])


@pytest.mark.usefixtures("eager_seeds")
def test_bert_with_activation_checkpointing(device):
    model = bert(device)
    expected = gradients_of(loss_of, model, batch := new_batch(device))
    checkpointed(model, False)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    assert_close(gradients_of(compiled, model, batch), expected, ROUNDING)
