"""Blocks run one by one say what the whole model says, and refuse where they would not."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, random_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.errors import PropagationError
from sharebasis.model.blocks import Blocks, embed

WINDOWS = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(1))


def _names(model: PreTrainedModel) -> list[str]:
    prefix, _ = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    )
    return [f"{prefix}.{i}" for i in range(len(model.get_submodule(prefix)))]


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_blocks_one_by_one_are_the_model(family: str) -> None:
    """Also on other tokens than those that the calls were recorded with, and a smaller batch."""
    model = random_model(family, 288)
    names = _names(model)
    blocks = Blocks(model, names, WINDOWS, batch=2)
    inputs: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs["last"] = args[0] if args else kwargs["hidden_states"]

    model.get_submodule(names[-1]).register_forward_pre_hook(note, with_kwargs=True)
    for chunk in (WINDOWS + 5).split(2):
        hidden = embed(model, names[0], chunk)
        before = hidden.clone()
        for i, name in enumerate(names[:-1]):
            hidden = blocks.run(i, model.get_submodule(name), hidden)
        torch.testing.assert_close(embed(model, names[0], chunk), before, rtol=0, atol=0)
        model.base_model(input_ids=chunk, use_cache=False)
        torch.testing.assert_close(hidden, inputs["last"], rtol=1e-5, atol=1e-5)


def test_a_block_that_is_given_something_else_is_refused() -> None:
    model = random_model("llama", 288)
    names = _names(model)
    with pytest.raises(PropagationError, match=r"model\.layers\.2 cannot be run by itself.*once"):
        Blocks(model, [names[0], names[2]], WINDOWS, batch=2)


def test_a_block_that_is_given_the_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", 288)
    third, tokens = model.model.layers[2], []
    plain = third.forward
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    third.forward = lambda hidden, text=None, **others: plain(hidden, **others)
    third.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "text": tokens[-1]}), with_kwargs=True
    )
    with pytest.raises(PropagationError, match=r"model\.layers\.2 .* depends on the text"):
        Blocks(model, _names(model), WINDOWS, batch=2)
