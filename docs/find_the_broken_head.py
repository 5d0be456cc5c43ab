"""From a compressed model to the head that broke.

After `make repro`, from the repository's top:

    python docs/find_the_broken_head.py
"""

from __future__ import annotations

import copy
import itertools

import torch

from sharebasis import load_compressed
from sharebasis.data.windows import cut, read_windows
from sharebasis.model.hub import load_model, load_tokenizer
from sharebasis.pipeline.paths import COMPRESSED, WEIGHTS
from sharebasis.pipeline.settings import load_settings
from sharebasis.residual.cache import Observer
from sharebasis.residual.head_views import head_views
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.verify.verify import compare

MATRICES = ("W_Q", "W_K", "W_V", "W_O")

settings = load_settings()
original = load_model(WEIGHTS, "float32", torch.device("cpu"))
compressed = load_compressed(COMPRESSED)
tokenizer = load_tokenizer(WEIGHTS)
windows = read_windows(
    tokenizer, cut(settings.data, "evaluation", 4, 256), "evaluation", settings.seed
)

# 1. Who makes the error?
attribution = attribute(original, compressed, windows)
heads = [component for component in attribution.ranked("kl") if component.head is not None]
print(f"KL(original || compressed) = {attribution.whole['kl']:.4f} nats.", end=" ")
print("The heads that make most of it:")
for component in heads[:4]:
    made, passed_on = 1e3 * component.own_error["kl"], 1e3 * component.inherited_error["kl"]
    print(f"  {component.label:6} makes {made:5.2f}, passes on {passed_on:5.2f}", end=" ")
    print("thousandths of a nat")
layer, head = heads[0].layer, heads[0].head
assert layer is not None
assert head is not None


# 2. Is it so, and which matrix is it? The original, with one head's compressed weights in it.
@torch.no_grad()
def cost(names: tuple[str, ...], layer: int, head: int) -> float:
    """KL(original || original with these matrices of one head compressed), nats."""
    patched = copy.deepcopy(original)
    views, others = head_views(patched)[layer], head_views(compressed)[layer]
    for name in names:
        weight, other = getattr(views, name), getattr(others, name)
        row = head * len(weight) // len(views.W_O)  # queries share keys and values
        weight[row] = other[row]
    return compare(original, {"": patched}, windows[:2], batch=2)[""].kl_mean


print(f"\nThe original with compressed matrices of {heads[0].label} only:")
for names in (MATRICES, *itertools.combinations(MATRICES, 1)):
    print(f"  {' '.join(names):16} {1e3 * cost(names, layer, head):5.2f} thousandths of a nat")
middle = heads[len(heads) // 2]
assert middle.layer is not None
assert middle.head is not None
print(f"The same four matrices of {middle.label}, in the middle of the ranking:")
middle_cost = cost(MATRICES, middle.layer, middle.head)
print(f"  {' '.join(MATRICES):16} {1e3 * middle_cost:5.2f} thousandths of a nat")

# 3. Where does it go wrong? The head on the original's stream, token by token.
names = ["z", "resid_pre", "resid_mid"]
_, cache = Observer(original)(windows, names)
_, forced = Observer(compressed)(windows, names, forced=cache)
error = (forced["result", layer] - cache["result", layer])[:, :, head].norm(dim=-1)
size = cache["result", layer][:, :, head].norm(dim=-1)
share = (error / size).mean()
print(f"\n|error of {heads[0].label}| / |what it adds|, mean over tokens: {share:.2f}")
print("The tokens at which its error is largest, with what stands before them:")
for place in error.flatten().topk(5).indices.tolist():
    window, i = divmod(place, windows.shape[1])
    before = tokenizer.decode(windows[window, max(0, i - 8) : i])
    token = tokenizer.decode(windows[window, i : i + 1])
    print(f"  {error[window, i]:6.1f} (of {size[window, i]:5.1f})  ...{before!r} -> {token!r}")
