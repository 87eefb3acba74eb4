"""MMEngine's Runner with checks of the data."""

from __future__ import annotations

import re
from typing import Any

from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from iconformer_mm.datasets.checks import DataError, check_dataset, describe, empty_error
from iconformer_mm.datasets.fit import check_fit, find_class_list_fault, look_at_model
from iconformer_mm.tuning.injection import unwrap
from iconformer_mm.tuning.unused import unused_adapters

# torch's error for parameters without a gradient, which it lists by index.
_NO_GRADIENT = re.compile(r'did not receive grad for rank \d+: ([\d ]+)')


@RUNNERS.register_module()
class CheckedRunner(Runner):
    """MMEngine's Runner with checks of the data.

    Its data errors name the data set or the file. It rejects data that does not fit the model. The command-line
    tools use it unless the config sets a ``runner_type``.
    """

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a data loader as MMEngine does, and check its data set.

        Raises:
            DataError: The data set cannot be loaded, or it has no samples.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        fault = find_class_list_fault(dataloader.get('dataset'))
        if fault:
            raise DataError(fault)
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except Exception as error:
            if 'need at least one array to concatenate' in str(error):  # MMEngine serializing no samples
                raise empty_error(dataloader.get('dataset')) from error
            where = describe(dataloader.get('dataset'))
            raise DataError(f'{where} cannot be loaded: {type(error).__name__}: {error}') from error
        check_dataset(loader.dataset)
        return loader

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model and data fit."""
        built = super().build_train_loop(loop)
        self._check(built, training=True)
        return built

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model, metrics and data fit."""
        built = super().build_val_loop(loop)
        self._check(built)
        return built

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model, metrics and data fit."""
        built = super().build_test_loop(loop)
        self._check(built)
        return built

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training. Reject a model that would fail at the second step.

        Raises:
            ValueError: Some adapters would get no gradient.
        """
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        if wrapped is not model and not getattr(wrapped, 'find_unused_parameters', True):
            unused = unused_adapters(model)
            if unused is not None:
                raise ValueError(unused)
        return wrapped

    def train(self) -> nn.Module:
        """Train as MMEngine does. If distributed training fails, name the parameters without a gradient.

        Raises:
            RuntimeError: Trained parameters get no gradient.
        """
        try:
            return super().train()
        except RuntimeError as error:
            found = _NO_GRADIENT.search(str(error))
            if 'Expected to have finished reduction' not in str(error) or found is None:
                raise
            trained = [name for name, p in unwrap(self.model).named_parameters() if p.requires_grad]
            names = [trained[index] for index in map(int, found[1].split()) if index < len(trained)]
            raise RuntimeError(
                f'{len(names)} trained parameters got no gradient, but distributed training waits for one: '
                f'{", ".join(names[:3])}{", ..." if len(names) > 3 else ""}. Set find_unused_parameters=True, or '
                'freeze parameters that the loss does not depend on'
            ) from error

    def _check(self, loop: BaseLoop, training: bool = False) -> None:
        check_loop(self, loop, training)


def check_loop(runner: Runner, loop: Any, training: bool = False) -> None:
    """Reject a loop whose data does not fit the model, before time is spent.

    Args:
        runner: The runner.
        loop: The loop. A loop without a data loader is ignored.
        training: Whether the loop trains. Defaults to False.

    Raises:
        DataError: The data does not fit. The message says why.
    """
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    if dataset is None:
        return
    trained_on = getattr(getattr(runner._train_loop, 'dataloader', None), 'dataset', None)
    metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', ())
    model = look_at_model(unwrap(runner.model))
    check_fit(model, dataset, metrics, training, None if training else trained_on)
