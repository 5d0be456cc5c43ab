"""Roles that are seen when a block runs, whatever its sublayers are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sharebasis.model import trace as tracing
from sharebasis.model.trace import Trace

D, D_MLP, D_LATENT = 8, 12, 3
Step = Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    """Linear sublayers by name, a norm, and what to do with them."""

    def __init__(self, linears: Mapping[str, tuple[int, int]], step: Step) -> None:
        super().__init__()
        self.norm, self.step = nn.LayerNorm(D), step
        for name, (d_out, d_in) in linears.items():
            self.add_module(name, nn.Linear(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


@dataclass(frozen=True)
class Case:
    step: Step
    linears: Mapping[str, tuple[int, int]]
    roles: Mapping[str, str]


ATTENTION = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D)}
MLP = {"up": (D_MLP, D), "down": (D, D_MLP)}
SQUARE_MLP = {"up": (D, D), "down": (D, D)}
ROLES = {"q": "read", "k": "read", "v": "read", "o": "write", "up": "read", "down": "write"}


def attention(b: Any, x: Tensor) -> Tensor:
    heads = (f(x).view(*x.shape[:-1], 2, D // 2).transpose(1, 2) for f in (b.q, b.k, b.v))
    y = functional.scaled_dot_product_attention(*heads)
    return b.o(y.transpose(1, 2).reshape(x.shape))


def mlp(b: Any, x: Tensor) -> Tensor:
    return b.down(functional.gelu(b.up(x)))


def in_place(b: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x += attention(b, b.norm(x))
    return x.add_(mlp(b, b.norm(x)))


def gated(b: Any, x: Tensor) -> Tensor:
    return x + torch.sigmoid(b.gate(x)) * mlp(b, x)


def routed(b: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, D)
    weight, tokens = b.router(flat).softmax(-1)[:, :1], torch.arange(len(flat), device=x.device)
    total = torch.zeros_like(flat).index_add_(0, tokens, mlp(b, flat[tokens]) * weight)
    return x + total.view(x.shape)


def latent(b: Any, x: Tensor) -> Tensor:
    return x + b.o(b.expand(functional.normalize(b.contract(x), dim=-1)))


def rotary(b: Any, x: Tensor) -> Tensor:
    """Sums of the stream's width that are not sums with the stream."""
    q = b.q(x)
    q = q * 0.3 + torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1) * 0.7
    return x + b.o(q + b.k(x))


def own_norm(b: Any, x: Tensor) -> Tensor:
    """A norm that is written out: differences of the stream with itself."""
    centred = x.float() - x.float().mean(-1, keepdim=True).expand(x.shape)
    return x + mlp(b, centred * (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())


def flattened(b: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    return (flat + mlp(b, b.norm(flat))).view(x.shape)


def asks(b: Any, x: Tensor) -> Tensor:
    """Looks at its numbers, which are not there on the meta device."""
    if (x != x).any() or x.sum().item() == 1e9:
        raise ValueError
    return x + mlp(b, x)


def chosen(b: Any, x: Tensor) -> Tensor:
    """Looks up which tokens to take, which nobody knows on the meta device."""
    flat = x.reshape(-1, D)
    (tokens,) = torch.nonzero(flat.sum(-1) < 1e9, as_tuple=True)
    return x + torch.zeros_like(flat).index_add(0, tokens, mlp(b, flat[tokens])).view(x.shape)


def mixed(b: Any, x: Tensor) -> Tensor:
    """What a latent makes of the stream gates the stream before it is read; the router that
    scales what is written is made of the same."""
    y = torch.sigmoid(b.expand(b.contract(x))) * x
    return x + mlp(b, y) * (y * b.norm.weight).sum(-1, keepdim=True).sigmoid()


def of_numbers(b: Any, x: Tensor) -> Tensor:
    return x + mlp(b, x) * (b.norm.weight.sum() + b.norm.bias.sum())


BESIDE = {**ROLES, "q": "ambiguous_unknown"}
WHOLE = {**ATTENTION, **MLP}
CASES = {
    "norm before": Case(
        lambda b, x: (y := x + attention(b, b.norm(x))) + mlp(b, b.norm(y)), WHOLE, ROLES
    ),
    "norm after the sum": Case(
        lambda b, x: b.norm((y := b.norm(x + attention(b, x))) + mlp(b, y)), WHOLE, ROLES
    ),
    "norm after the sublayer": Case(
        lambda b, x: (y := x + b.norm(attention(b, x))) + b.norm(mlp(b, y)), WHOLE, ROLES
    ),
    "side by side": Case(lambda b, x: attention(b, y := b.norm(x)) + mlp(b, y) + x, WHOLE, ROLES),
    "side by side, one after the other": Case(
        lambda b, x: x + attention(b, y := b.norm(x)) + mlp(b, y), WHOLE, ROLES
    ),
    "all of them square": Case(
        lambda b, x: (y := x + attention(b, b.norm(x))) + mlp(b, b.norm(y)),
        {**ATTENTION, **SQUARE_MLP},
        ROLES,
    ),
    "in place": Case(in_place, WHOLE, ROLES),
    "a residual multiplier": Case(lambda b, x: x + 0.25 * mlp(b, x), MLP, ROLES),
    "a multiplier within the sum": Case(
        lambda b, x: torch.add(x, mlp(b, x), alpha=0.25), SQUARE_MLP, ROLES
    ),
    "a multiplier of the stream": Case(lambda b, x: 0.5 * x + mlp(b, x), SQUARE_MLP, ROLES),
    "a difference": Case(lambda b, x: x - mlp(b, x), SQUARE_MLP, ROLES),
    "the stream in float32": Case(
        lambda b, x: (x.float() + mlp(b, x).float()).to(x.dtype), SQUARE_MLP, ROLES
    ),
    "tokens in one row": Case(flattened, SQUARE_MLP, ROLES),
    "a norm written out": Case(own_norm, SQUARE_MLP, ROLES),
    "sums before the stream's": Case(rotary, ATTENTION, {"q": "read", "k": "read", "o": "write"}),
    "a gate of what is written": Case(
        gated, {**SQUARE_MLP, "gate": (1, D)}, {**ROLES, "gate": "read"}
    ),
    "a router": Case(routed, {**MLP, "router": (2, D)}, {**ROLES, "router": "read"}),
    "a question about the numbers": Case(asks, SQUARE_MLP, ROLES),
    "a latent": Case(
        latent,
        {"contract": (D_LATENT, D), "expand": (D, D_LATENT), "o": (D, D)},
        {"contract": "read", "expand": "neither", "o": "write"},
    ),
    "three in a row": Case(
        lambda b, x: x + b.o(b.k(b.q(x))), ATTENTION, {"q": "read", "k": "neither", "o": "write"}
    ),
    "both ends at the stream": Case(lambda b, x: x + b.q(x), ATTENTION, {"q": "ambiguous_unknown"}),
    "a path beside an MLP": Case(
        lambda b, x: x + (b.q(x) + mlp(b, x)), {**SQUARE_MLP, "q": (D, D)}, BESIDE
    ),
    "a path beside an MLP, laid out first": Case(
        lambda b, x: x + torch.stack([b.q(x), mlp(b, x)]).sum(0),
        {**SQUARE_MLP, "q": (D, D)},
        BESIDE,
    ),
    "a path beside an MLP, gated": Case(
        lambda b, x: x + torch.sigmoid(b.gate(x)) * (b.q(x) + mlp(b, x)),
        {**SQUARE_MLP, "q": (D, D), "gate": (D, D)},
        {**BESIDE, "gate": "read"},
    ),
    "a gate of an MLP, beside it as well": Case(
        lambda b, x: x + ((y := b.gate(x)) + torch.sigmoid(y) * mlp(b, x)),
        {**SQUARE_MLP, "gate": (D, D)},
        {**ROLES, "gate": "ambiguous_unknown"},
    ),
    "a path that gates itself": Case(
        lambda b, x: x + (y := b.q(x) + mlp(b, x)) * torch.sigmoid(y),
        {**SQUARE_MLP, "q": (D, D)},
        BESIDE,
    ),
    "a stream that begins anew": Case(
        lambda b, x: (y := attention(b, b.norm(x))) + mlp(b, b.norm(torch.stack([x, y]).mean(0))),
        {**ATTENTION, **SQUARE_MLP},
        ROLES,
    ),
    "a choice of tokens": Case(chosen, SQUARE_MLP, ROLES),
    "a gate of the stream": Case(
        mixed,
        {**SQUARE_MLP, "contract": (D_LATENT, D), "expand": (D, D_LATENT)},
        {**ROLES, "contract": "read", "expand": "neither"},
    ),
    "an output that goes nowhere": Case(
        lambda b, x: x + 0 * b.q(x).sum(), ATTENTION, {"q": "read"}
    ),
}


def trace(case: Case, device: str) -> Mapping[str, str]:
    return traced(case, device).roles


def traced(case: Case, device: str) -> Trace:
    """Of two blocks, one after the other."""
    with torch.device(device):
        blocks = [Block(case.linears, case.step) for _ in range(2)]
        x = torch.randn(2, 5, D)
    sublayers = {
        f"{i}.{name}": getattr(block, name)
        for i, block in enumerate(blocks)
        for name in case.linears
    }
    named = {str(i): block for i, block in enumerate(blocks)}
    return tracing.trace(named, sublayers, D, lambda: blocks[1](blocks[0](x)))


def expected(case: Case) -> Mapping[str, str]:
    ran = case.roles.keys() & case.linears.keys()
    return {f"{i}.{name}": case.roles[name] for i in range(2) for name in ran}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_what_a_sublayer_does_is_seen(name: str, device: str) -> None:
    assert trace(CASES[name], device) == expected(CASES[name])


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("norm before", set()),
        ("a path beside an MLP, gated", {"gate"}),
        ("a gate of what is written", {"gate"}),
        ("a gate of an MLP, beside it as well", set()),
        ("a router", {"router"}),
        ("a gate of the stream", {"expand"}),
        ("an output that goes nowhere", {"q"}),
    ],
)
def test_gates_and_routers_pass_nothing_on(name: str, factors: set[str]) -> None:
    found = traced(CASES[name], "meta")
    assert found.roles.keys() - found.passed_on == {f"{i}.{one}" for i in (0, 1) for one in factors}


def test_a_sum_of_two_numbers_is_not_the_stream() -> None:
    case = Case(of_numbers, SQUARE_MLP, ROLES)
    assert trace(case, "cpu") == expected(case)


class SeveralStreams(Block):
    """Hyper-connections: what is read is a mixture of the streams, what is written goes to all."""

    def __init__(self, n: int, apart: bool) -> None:
        mix = {"contract": (D_LATENT, n * D), "expand": (n * D, D_LATENT), "inject": (n, n * D)}
        super().__init__({**WHOLE, **mix}, lambda b, x: x)
        self.n, self.apart = n, apart

    def forward(self, x: Tensor) -> Tensor:
        streams = x if self.apart else x.unflatten(-1, (self.n, D))
        for sublayers in (attention, mlp):
            flat = streams.flatten(-2)
            gate = torch.sigmoid(self.expand(self.contract(flat))).unflatten(-1, (self.n, D))
            y = sublayers(self, self.norm((gate * streams).mean(-2)))
            streams = streams + y[..., None, :] * torch.sigmoid(self.inject(flat))[..., None]
            if not self.apart:
                streams = (flat + (streams.flatten(-2) - flat)).unflatten(-1, (self.n, D))
        return streams if self.apart else streams.flatten(-2)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_several_streams_are_read_through_gates_and_written_to_together(
    apart: bool, device: str
) -> None:
    with torch.device(device):
        blocks = [SeveralStreams(3, apart) for _ in range(2)]
        x = torch.randn(2, 5, 3, D) if apart else torch.randn(2, 5, 3 * D)
    names = (*WHOLE, "contract", "expand", "inject")
    sublayers = {f"{i}.{name}": getattr(blocks[i], name) for i in range(2) for name in names}
    named = dict(zip("01", blocks, strict=True))
    found = tracing.trace(named, sublayers, D, lambda: run(blocks, x)).roles
    roles = {**ROLES, "contract": "read", "expand": "neither", "inject": "read"}
    assert found == {f"{i}.{name}": role for i in range(2) for name, role in roles.items()}


def run(blocks: list[SeveralStreams], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_what_does_not_run_has_no_role() -> None:
    found = trace(Case(lambda b, x: x + mlp(b, x), {**MLP, "idle": (D, D)}, {}), "cpu")
    assert found.keys() == {"0.up", "0.down", "1.up", "1.down"}


def test_what_reads_something_else_than_the_stream_does_not_read_it() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor, *, memory: Tensor) -> Tensor:
            return x + self.o(self.q(x) @ self.k(memory).mT @ memory)

    block = Crossed()
    sublayers = {name: getattr(block, name) for name in "qko"}
    found = tracing.trace(
        {"": block}, sublayers, D, lambda: block(torch.ones(4, D), memory=torch.ones(4, D))
    )
    assert found.roles == {"q": "read", "k": "neither", "o": "write"}


def test_the_stream_is_a_blocks_first_input_of_numbers_however_it_is_given() -> None:
    class Late(Block):
        def forward(self, ids: Tensor, flag: object = None, *, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.step(self, x)

    block = Late(SQUARE_MLP, lambda b, x: x + mlp(b, b.norm(x)))
    sublayers = {name: getattr(block, name) for name in SQUARE_MLP}
    ids = torch.zeros(4, dtype=torch.long)
    found = tracing.trace({"": block}, sublayers, D, lambda: block(ids, x=torch.ones(4, D)))
    assert found.roles == {"up": "read", "down": "write"}


@pytest.mark.parametrize("first", [False, True])
def test_a_sublayer_that_reads_the_stream_only_once_of_twice_does_not_read_it(first: bool) -> None:
    def twice(b: Any, x: Tensor) -> Tensor:
        y = b.up(x) if first else b.up(b.down(x))
        return x + b.down(y if not first else b.up(y)) + b.down(b.up(x))

    found = trace(Case(twice, SQUARE_MLP, {}), "cpu")
    assert found == {"0.up": "neither", "0.down": "write", "1.up": "neither", "1.down": "write"}


def test_another_width_is_not_the_stream() -> None:
    case = CASES["norm before"]
    blocks = {"0": Block(case.linears, case.step)}
    sublayers = {name: getattr(blocks["0"], name) for name in case.linears}
    found = tracing.trace(blocks, sublayers, D + 1, lambda: blocks["0"](torch.ones(1, 4, D)))
    assert "write" not in found.roles.values()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    def step(b: Any, x: Tensor) -> Tensor:
        if fails:
            raise ValueError("in the middle")
        return x + mlp(b, x)

    block = Block(MLP, step)
    sublayers = {name: getattr(block, name) for name in MLP}
    before = torch.ones(1, 4, D) + 1
    try:
        tracing.trace({"": block}, sublayers, D, lambda: block(before))
    except ValueError:
        assert fails
    for module in block.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.full((1, 4, D), 2.0))
