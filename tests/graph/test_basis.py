"""A rotation of the residual stream goes unnoticed, or the operator that would notice it is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lorashear as ls
from lorashear.graph.basis import Basis, NoBasisError, basis_of
from lorashear.graph.groups import Kind, NodeGroup

WIDTH = 6


def residual(graph: ls.Graph) -> NodeGroup:
    return max((group for group in graph if group.kind is Kind.RESIDUAL), key=lambda group: len(group.members))


def test_llama(pico_llama: Callable[..., PreTrainedModel]) -> None:
    graph = ls.discover(pico_llama(), realisable=False)
    basis = basis_of(graph, residual(graph))
    layer = "model.layers.1"
    assert {place.parameter: place.dim for place in basis.places if place.parameter.startswith(layer)} == {
        f"{layer}.self_attn.q_proj.weight": 1,
        f"{layer}.self_attn.k_proj.weight": 1,
        f"{layer}.self_attn.v_proj.weight": 1,
        f"{layer}.self_attn.o_proj.weight": 0,
        f"{layer}.mlp.gate_proj.weight": 1,
        f"{layer}.mlp.up_proj.weight": 1,
        f"{layer}.mlp.down_proj.weight": 0,
    }
    gains = {gain.parameter: {reader.parameter for reader in gain.readers} for gain in basis.gains}
    assert gains[f"{layer}.post_attention_layernorm.weight"] == {
        f"{layer}.mlp.gate_proj.weight",
        f"{layer}.mlp.up_proj.weight",
    }
    assert gains["model.norm.weight"] == {"lm_head.weight"}
    assert basis.measured == (
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    )
    assert basis.writers[0] == "model.embed_tokens"
    assert len(basis.writers) == 5


def test_a_gain_before_a_tied_head_has_no_reader(pico_llama: Callable[..., PreTrainedModel]) -> None:
    graph = ls.discover(pico_llama(tied=True), realisable=False)
    basis = basis_of(graph, residual(graph))
    assert [gain.parameter for gain in basis.gains if not gain.readers] == ["model.norm.weight"]


def test_layer_norm_is_named() -> None:
    config = GPT2Config(n_embd=24, n_head=2, n_layer=1, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    graph = ls.discover(GPT2LMHeadModel(config), realisable=False)
    with pytest.raises(NoBasisError, match=r"native_layer_norm in transformer.h.0.ln_1"):
        basis_of(graph, residual(graph))


class Toy(nn.Module):
    """Writes a stream, does something with it, reads it."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.again = nn.Linear(WIDTH, 3, bias=False)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.middle(self, self.write(x)))
        return out


def toy_basis(middle: Callable[[nn.Module, Tensor], Tensor]) -> Basis:
    graph = ls.discover(Toy(middle), inputs={"x": torch.ones(2, 5, 4)}, realisable=False)
    group = next(g for g in graph if any(m.parameter == "write.weight" and m.dim == 0 for m in g.members))
    return basis_of(graph, group)


# ruff: noqa: ARG005 -- toys take themselves in

UNNOTICED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nothing": lambda m, x: x,
    "scaled": lambda m, x: x * 3.0 / 2.0,
    "normed": lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True)),
    "length": lambda m, x: x / x.norm(dim=-1, keepdim=True),
    "gained": lambda m, x: x * m.gain,
    "offset": lambda m, x: x * (1.0 + m.gain),
    "shifted": lambda m, x: x + m.shift,
    "mixed": lambda m, x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
}
NOTICED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "relu": lambda m, x: torch.relu(x),
    "constant added": lambda m, x: x + 1.0,
    "entries summed": lambda m, x: x * x.sum(-1, keepdim=True),
    "gated by itself": lambda m, x: x * (x + m.shift),
    "weighed squares": lambda m, x: x * ((x * x) @ m.again.weight.T).sum(-1, keepdim=True),
    "gain then sum": lambda m, x: x * m.gain + x,
    "length after a gain": lambda m, x: x * (x * m.gain).norm(dim=-1, keepdim=True),
    "inverse": lambda m, x: 1.0 / x,
    "both gain and shift": lambda m, x: x * m.gain + m.gain,
    "a number in the shift": lambda m, x: x + (m.shift + 1.0),
    "offset of a multiple": lambda m, x: x * (1.0 + 2.0 * m.gain),
    "offset of the negative": lambda m, x: x * (-m.gain + 1.0),
    "with and without offset": lambda m, x: (
        x * (1.0 + m.gain) * torch.rsqrt((x * x).mean(-1, keepdim=True)) + x * m.gain
    ),
    "a number in the weights": lambda m, x: x * (x @ (m.again.weight + 1.0).T).sum(-1, keepdim=True),
    "the largest": lambda m, x: x * x.amax(-1, keepdim=True),
}


@pytest.mark.parametrize("middle", UNNOTICED.values(), ids=UNNOTICED.keys())
def test_unnoticed(middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """The claim is checked with numbers: the rotated toy gives the same."""
    from lorashear.surgery.rotate import rotate_

    basis = toy_basis(middle)
    toy = Toy(middle)
    with torch.no_grad():
        toy.gain.uniform_(0.5, 1.5)
        toy.shift.uniform_(-1.0, 1.0)
        x = torch.randn(2, 5, 4)
        before = toy(x)
        rotate_(toy, basis, torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])
        assert torch.allclose(toy(x), before, atol=1e-5)


@pytest.mark.parametrize("middle", NOTICED.values(), ids=NOTICED.keys())
def test_noticed(middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(NoBasisError):
        toy_basis(middle)
