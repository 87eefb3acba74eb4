"""One batch in which each sample goes through an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class MixedBatch:
    """A plan of which sample of a batch goes through which adapter. Made by :func:`mixed`.

    It is a context manager that can be entered any number of times, in any number of threads. Only the thread that
    entered it is affected. The weights of adapters of one shape are stacked once, when the plan is made. The plan
    holds the stacks.

    Attributes:
        adapters: Name of the adapter of each sample, None for a sample without an adapter.
    """

    adapters: tuple[str | None, ...]

    def __enter__(self) -> MixedBatch:
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        raise NotImplementedError


def mixed(model: nn.Module, adapters: Sequence[str | None]) -> MixedBatch:
    """Let each sample of a batch go through its own adapter, neck and head within the context (ours).

    The base runs once over the whole batch. Adapters of one shape run as one batched product. The results are those
    of one adapter at a time, up to rounding. Methods may be mixed. It is for prediction: within the context no
    gradients are recorded, and a model in training mode is refused.

    Args:
        model: An adapted model in evaluation mode, or its backbone. Call what was given here: a model's
            ``test_step(data)`` or ``model(inputs, data_samples, mode='predict')`` returns the predictions in the
            order of the samples. A backbone returns the features in that order.
        adapters: Name of the adapter of each sample of the batch, in order. None is a sample without an adapter. It
            goes through the base, and the neck and head of the active adapter.

    Returns:
        The plan, a context manager. Keep it to run several batches of the same adapters.

    Raises:
        ValueError: The model is not adapted, merged or wrapped, it lacks an adapter, ``adapters`` is empty or not a
            list of names, or the method of an adapter cannot be mixed. Entering a plan raises it, if an adapter was
            deleted or its weights were changed since the plan was made.
        RuntimeError: Within the context, if the batch has another number of samples, samples differ in size, the model
            is in training mode or asked for a loss, or it mixes up the samples of a batch.

    Example:
        >>> with mixed(model, ['birds', 'cars', 'birds', None]):
        ...     predictions = model.test_step(data)  # of four images
    """
    raise NotImplementedError
