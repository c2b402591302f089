"""Where numbers stop being finite."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(
    model: nn.Module,
    images: Tensor,
    autocast: Callable[[], AbstractContextManager],
    options: Mapping[str, Any],
) -> str:
    """A sentence on what is not finite first when `model` sees `images` (again): images, weights, or a layer's output.

    A layer is reported when it ends, so the innermost comes first. `model` keeps its mode; its dropped paths are drawn
    anew, for which reason everything may be finite this time. options: further arguments of its forward.
    """
    if not images.isfinite().all():
        return "the images themselves are not finite"
    weights = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if weights:
        return f"{len(weights)} weights are not finite, the first is {weights[0]}"
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not all(x.isfinite().all() for x in _tensors(output)):
                found.append(f"{name or 'the model itself'} ({type(module).__name__})")

        return module.register_forward_hook(look)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"), autocast():
            model(images, **options)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    return "every layer's output is finite when the batch runs again, so the loss itself is what overflows"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
