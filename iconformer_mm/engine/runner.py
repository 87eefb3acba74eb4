"""MMEngine's Runner with data that is checked."""

from __future__ import annotations

from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from iconformer_mm.datasets.checks import DataError, check_dataset, describe, empty_error


@RUNNERS.register_module()
class CheckedRunner(Runner):
    """MMEngine's Runner, whose errors in data name the data set or the file.

    The command-line tools take it unless the config names a ``runner_type``.
    """

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a data loader as MMEngine does, and check its data set.

        Raises:
            DataError: The data set cannot be loaded or has no samples.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except Exception as error:
            if 'need at least one array to concatenate' in str(error):  # MMEngine serializing no samples
                raise empty_error(dataloader.get('dataset')) from error
            where = describe(dataloader.get('dataset'))
            raise DataError(f'{where} cannot be loaded: {type(error).__name__}: {error}') from error
        check_dataset(loader.dataset)
        return loader
