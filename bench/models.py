"""A training step of models of transformers with random weights, with one normalization or another."""

from typing import NamedTuple

import torch

import klnorm

from . import eager

MODELS = {"bert": "BERT-base", "gpt2": "GPT-2 small"}
NUM_EXAMPLES = 10_000  # the KL's weight in the loss is 1 / NUM_EXAMPLES; it does not matter to the time


class Line(NamedTuple):
    """Which step. `smoke`: tiny, on the CPU."""

    model: str
    norm: str
    mode: str
    layers: int
    smoke: bool

    def __str__(self):
        return f"{self.model:<12} {self.norm:<15} {self.mode:<9}"

    @property
    def device(self):
        return torch.device("cpu" if self.smoke else "cuda")


def make_model(line):
    """(the model, random tokens and labels)."""
    import transformers

    torch.manual_seed(0)
    width, heads, positions = (32, 2, 16) if line.smoke else (768, 12, 1024)
    if line.model == MODELS["gpt2"]:
        vocabulary, batch, length = (64, 2, 8) if line.smoke else (50257, 8, 1024)
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=line.layers, n_head=heads,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        vocabulary, batch, length = (64, 2, 8) if line.smoke else (30522, 32, 128)
        config = transformers.BertConfig(
            vocab_size=vocabulary, max_position_embeddings=min(512, positions), hidden_size=width,
            num_hidden_layers=line.layers, num_attention_heads=heads, intermediate_size=4 * width,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
    tokens = torch.randint(vocabulary, (2, batch, length), generator=torch.Generator().manual_seed(0))
    return model.to(line.device).train(), tokens.to(line.device)


def with_norm(model, norm, device):
    """(model with the normalization, function that computes its weighted KL)."""
    kind, _, noise = norm.partition(", ")
    if kind == "klnorm":
        kl_weight = klnorm.KLWeight(num_examples=NUM_EXAMPLES, device=device)
        return klnorm.replace_layer_norm(model, noise=noise), kl_weight
    if kind == "eager":
        return eager.replace_with_eager(model, noise), lambda m: eager.kl_divergence(m) / NUM_EXAMPLES
    return model, lambda m: 0.0


def make_step(line):
    """A function that makes one training step and returns the loss."""
    model, (tokens, labels) = make_model(line)
    model, weighted_kl = with_norm(model, line.norm, line.device)
    on_gpu = line.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=on_gpu)

    def loss_of(tokens, labels):
        with torch.autocast(line.device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        return loss + weighted_kl(model)

    torch._inductor.config.cpp.enable_kernel_profile = not on_gpu  # to count kernels
    compute = torch.compile(loss_of) if line.mode == "compiled" else loss_of

    def step():
        loss = compute(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return capture(step) if line.mode == "captured" else step


def capture(step):
    """A function that replays `step`, captured into a CUDA graph after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss

    return replay
