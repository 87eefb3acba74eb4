"""What an iCoN model loses when its kernels are not those of the image: the direct test of conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .kernel_probe import icon_adapters

SWAPS = ('own', 'another', 'mean', 'random')


class KernelBank:
    """The kernels that every iCoN adapter of a model made for a series of images, in their order.

    Attributes:
        kernels: By the adapter's name in the backbone, (N, c, K, K).
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    @property
    def kernels(self) -> dict[str, Tensor]:
        """The kernels of each adapter, (N, c, K, K)."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record what the adapters of a model make meanwhile.

        Args:
            model: An adapted model. Give it all images once, in order.

        Raises:
            ValueError: The model has no iCoN adapters, or they make several sets of kernels per image.
        """
        with ExitStack() as hooks:
            for name, adapter in icon_adapters(model).items():
                if adapter.window_size is not None:
                    raise ValueError(f'{name} makes kernels for each window; only kernels of whole images are swapped')
                parts = self._parts.setdefault(name, [])

                def record(icon: nn.Module, args: tuple, made: Tensor, parts: list[Tensor] = parts) -> None:
                    parts.append(made.detach().clone())

                hooks.enter_context(adapter.icon.register_forward_hook(record))
            yield

    def swapped(self, swap: str, seed: int = 0) -> dict[str, Tensor]:
        """Choose the kernels that each image gets instead of its own. All adapters choose alike.

        Args:
            swap: ``'own'``, ``'another'`` (those of another image, each used once), ``'mean'`` (the mean over all
                images), or ``'random'`` (for every tap, a normal variable of the mean and the deviation over images).
            seed: Of the choice. Defaults to 0.

        Returns:
            The kernels of each adapter, (N, c, K, K).

        Raises:
            ValueError: The name is unknown, or there are fewer than two images.
        """
        if swap not in SWAPS:
            raise ValueError(f'swap must be one of {", ".join(SWAPS)}, got {swap!r}')
        kernels = self.kernels
        number = len(next(iter(kernels.values()), ()))
        if number < 2:
            raise ValueError(f'kernels are swapped between images, and {number} were recorded')
        generator = torch.Generator().manual_seed(seed)
        if swap == 'another':
            # A random cycle through all images: no image keeps its own kernels.
            order = torch.randperm(number, generator=generator)
            source = torch.empty(number, dtype=torch.long)
            source[order] = order.roll(1)
            return {name: values[source.to(values.device)] for name, values in kernels.items()}
        if swap == 'mean':
            return {name: values.mean(0, keepdim=True).expand_as(values) for name, values in kernels.items()}
        if swap == 'random':
            found = {}
            for name, values in kernels.items():
                noise = torch.randn(values.shape, generator=generator).to(values)
                found[name] = values.mean(0) + values.std(0) * noise
            return found
        return kernels


@contextmanager
def given_kernels(model: nn.Module, kernels: dict[str, Tensor]) -> Iterator[None]:
    """Let the iCoN adapters of a model filter by given kernels.

    Args:
        model: An adapted model. It gets the images of the kernels once, in order, in batches of any size.
        kernels: Those of each adapter, (N, c, K, K).

    Raises:
        ValueError: The model has other adapters, or sees more or fewer images than there are kernels.
    """
    adapters = icon_adapters(model)
    if adapters.keys() != kernels.keys():
        raise ValueError(f'the kernels are of {", ".join(kernels)}; the model has {", ".join(adapters)}')
    remaining = {name: iter(kernels[name]) for name in adapters}
    with ExitStack() as hooks:
        for name, adapter in adapters.items():

            def replace(icon: nn.Module, args: tuple, made: Tensor, left: Iterator[Tensor] = remaining[name]) -> Tensor:
                given = [kernel for _, kernel in zip(range(len(made)), left)]
                if len(given) < len(made):
                    raise ValueError('the model was given more images than kernels were recorded for')
                return torch.stack(given).to(made)

            hooks.enter_context(adapter.icon.register_forward_hook(replace))
        yield
    if any(next(left, None) is not None for left in remaining.values()):
        raise ValueError('the model was given fewer images than kernels were recorded for')
