"""What a prediction is of, and all that depends on it: its drawing, its description, its maps and its score."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.structures import BaseDataElement
from torch import Tensor

from .drawing import draw_boxes, draw_classes, draw_depth, draw_instances, enlarge

SCORE_THRESHOLD = 0.3
TOP_INSTANCES = 10
TOP_LABELS = 5
MILLIMETRE = 0.001


@dataclass(frozen=True)
class EncodeOptions:
    """What :func:`encode_prediction` includes; see there."""

    score_threshold: float
    top_k: int
    maps: bool


class PredictionKind:
    """Predictions of one kind.

    Attributes:
        field: What a data sample with such a prediction has.
        key: What its description has.
    """

    field: str
    key: str

    def draw(
        self, image: np.ndarray, prediction: BaseDataElement, path: str, meta: dict[str, Any], score_threshold: float
    ) -> None:
        """Draw a prediction; see :func:`draw_prediction`."""
        raise NotImplementedError

    def describe(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, score_threshold: float
    ) -> dict[str, Any]:
        """A prediction as plain data; see :func:`describe_prediction`."""
        raise NotImplementedError

    def encode(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, options: EncodeOptions
    ) -> dict[str, Any]:
        """A prediction as data for JSON; see :func:`encode_prediction`."""
        raise NotImplementedError

    def caption(self, described: Mapping[str, Any]) -> str:
        """A description in a few words."""
        raise NotImplementedError

    def write_maps(self, prediction: BaseDataElement, path: Path) -> list[Path]:
        """Write what a picture does not show; see :func:`write_maps`."""
        return []

    def picture(
        self,
        sample: BaseDataElement,
        image: np.ndarray,
        palette: Sequence[Sequence[int]],
        which: str = 'pred',
        score_threshold: float = SCORE_THRESHOLD,
    ) -> np.ndarray:
        """What a data sample says, to be seen beside others: a picture (H, W, 3), or a map (H, W) in metres.

        Args:
            sample: The data sample.
            image: (H, W, 3), uint8, RGB.
            palette: RGB of each class.
            which: ``'pred'`` for the prediction, ``'gt'`` for the ground truth. Defaults to ``'pred'``.
            score_threshold: Predicted instances of a smaller score are left out. Defaults to 0.3.

        Raises:
            ValueError: There are no such pictures of this kind.
        """
        raise ValueError(f'there is no picture of a {type(self).__name__.lower()} to see beside others')

    def score(self, prediction: BaseDataElement) -> Tensor:
        """What the model says, as one number that can be differentiated."""
        raise NotImplementedError


class Depth(PredictionKind):
    """A map of depths in metres."""

    field, key = 'pred_depth_map', 'depth_m'

    def draw(
        self, image: np.ndarray, prediction: BaseDataElement, path: str, meta: dict[str, Any], score_threshold: float
    ) -> None:
        """The image and its depth map beside each other, with a bar in metres."""
        draw_depth(image, prediction.pred_depth_map.data.squeeze().cpu().numpy(), path)

    def describe(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, score_threshold: float
    ) -> dict[str, Any]:
        """Smallest, median and largest depth."""
        depth = prediction.pred_depth_map.data.float()
        return dict(depth_m=dict(min=depth.min().item(), median=depth.median().item(), max=depth.max().item()))

    def encode(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, options: EncodeOptions
    ) -> dict[str, Any]:
        """The depths as a grey PNG of 16 bits, and the metres that one step of it stands for."""
        content = dict(task='depth', **self.describe(prediction, classes, options.score_threshold))
        if options.maps:
            depth = prediction.pred_depth_map.data.float().squeeze().cpu().numpy()
            step = max(MILLIMETRE, float(depth.max()) / 65535)
            content['map'] = dict(png=png(np.rint(depth.clip(0) / step).astype(np.uint16)), metres_per_step=step)
        return content

    def caption(self, described: Mapping[str, Any]) -> str:
        """From where to where."""
        depth = described['depth_m']
        return f'depth {depth["min"]:.2f} to {depth["max"]:.2f} m'

    def write_maps(self, prediction: BaseDataElement, path: Path) -> list[Path]:
        """The depths, (H, W), float32."""
        file = Path(f'{path}_depth.npy')
        np.save(file, prediction.pred_depth_map.data.squeeze().cpu().numpy().astype(np.float32))
        return [file]

    def picture(
        self,
        sample: BaseDataElement,
        image: np.ndarray,
        palette: Sequence[Sequence[int]],
        which: str = 'pred',
        score_threshold: float = SCORE_THRESHOLD,
    ) -> np.ndarray:
        """The depths."""
        return sample.get(f'{which}_depth_map').data[0].cpu().numpy()

    def score(self, prediction: BaseDataElement) -> Tensor:
        """The sum of the map, in metres."""
        return prediction.pred_depth_map.data.sum()


class Segmentation(PredictionKind):
    """A class for each pixel."""

    field, key = 'pred_sem_seg', 'area'

    def draw(
        self, image: np.ndarray, prediction: BaseDataElement, path: str, meta: dict[str, Any], score_threshold: float
    ) -> None:
        """The map of classes over the image."""
        from mmseg.visualization import SegLocalVisualizer

        visualizer = SegLocalVisualizer(alpha=0.5)
        visualizer.set_dataset_meta(**meta)
        visualizer.add_datasample('prediction', image, prediction, draw_gt=False, out_file=path)

    def describe(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, score_threshold: float
    ) -> dict[str, Any]:
        """The share of the image that each class has."""
        labels, counts = prediction.pred_sem_seg.data.unique(return_counts=True)
        shares = (counts / counts.sum()).tolist()
        return dict(area={str(name_of(label, classes)): share for label, share in zip(labels.tolist(), shares)})

    def encode(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, options: EncodeOptions
    ) -> dict[str, Any]:
        """The class indices as a grey PNG: 8 bits, or 16 where an index is above 255."""
        content = dict(task='segmentation', **self.describe(prediction, classes, options.score_threshold))
        if options.maps:
            labels = label_map(prediction)
            names = {str(label): str(name_of(label, classes)) for label in np.unique(labels).tolist()}
            content['map'] = dict(png=png(labels), classes=names)
        return content

    def caption(self, described: Mapping[str, Any]) -> str:
        """The three classes with the largest shares."""
        largest = sorted(described['area'].items(), key=lambda item: -item[1])[:3]
        return ', '.join(f'{name} {share:.0%}' for name, share in largest)

    def write_maps(self, prediction: BaseDataElement, path: Path) -> list[Path]:
        """The class indices, as a grey picture: 8 bits, or 16 where an index is above 255."""
        file = Path(f'{path}_labels.png')
        cv2.imwrite(str(file), label_map(prediction))
        return [file]

    def picture(
        self,
        sample: BaseDataElement,
        image: np.ndarray,
        palette: Sequence[Sequence[int]],
        which: str = 'pred',
        score_threshold: float = SCORE_THRESHOLD,
    ) -> np.ndarray:
        """The classes in their colours."""
        return draw_classes(sample.get(f'{which}_sem_seg').data[0].cpu().numpy(), palette)

    def score(self, prediction: BaseDataElement) -> Tensor:
        """The mean logit of the predicted classes."""
        return prediction.seg_logits.data.max(dim=0).values.mean()


class Instances(PredictionKind):
    """Boxes, with masks or without."""

    field, key = 'pred_instances', 'instances'

    def draw(
        self, image: np.ndarray, prediction: BaseDataElement, path: str, meta: dict[str, Any], score_threshold: float
    ) -> None:
        """Boxes, masks and scores over the image, which is enlarged if it is small."""
        from mmdet.visualization import DetLocalVisualizer

        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = {'palette': 'random', **meta}
        image, prediction = enlarge(image, prediction)
        options = dict(draw_gt=False, out_file=path, pred_score_thr=score_threshold)
        visualizer.add_datasample('prediction', image, prediction, **options)

    def describe(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, score_threshold: float
    ) -> dict[str, Any]:
        """Name, score and box of each instance."""
        found = above(prediction, score_threshold)
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
        return dict(instances=[dict(name=name_of(label, classes), score=score, box=box) for label, score, box in rows])

    def encode(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, options: EncodeOptions
    ) -> dict[str, Any]:
        """Label, name, score and box of each instance, with its mask in COCO's compressed run-length encoding."""
        found = above(prediction, options.score_threshold).cpu()
        described = self.describe(prediction, classes, options.score_threshold)['instances']
        instances = [dict(label=label, **each) for label, each in zip(found.labels.tolist(), described)]
        if options.maps and 'masks' in found:
            for instance, mask in zip(instances, found.masks):
                instance['mask'] = run_lengths(np.asarray(mask))
        return dict(task='detection', instances=instances)

    def caption(self, described: Mapping[str, Any]) -> str:
        """How many there are."""
        return f'{len(described["instances"])} instances'

    def picture(
        self,
        sample: BaseDataElement,
        image: np.ndarray,
        palette: Sequence[Sequence[int]],
        which: str = 'pred',
        score_threshold: float = SCORE_THRESHOLD,
    ) -> np.ndarray:
        """The masks over the image; without masks the boxes."""
        found = sample.gt_instances if which == 'gt' else above(sample, score_threshold).cpu()
        labels = found.labels.tolist()
        if 'masks' not in found:
            boxes = getattr(found.bboxes, 'tensor', found.bboxes)  # MMDetection wraps those of the ground truth
            return draw_boxes(image, boxes.tolist(), labels, palette)
        masks = found.masks.masks.astype(bool) if which == 'gt' else found.masks.numpy()
        return draw_instances(image, masks, labels, palette)

    def score(self, prediction: BaseDataElement) -> Tensor:
        """The sum of the ten largest scores; 0 if nothing is found."""
        scores = prediction.pred_instances.scores
        return scores.topk(min(TOP_INSTANCES, len(scores))).values.sum()


class Classification(PredictionKind):
    """A class for the image."""

    field, key = 'pred_score', 'label'

    def draw(
        self, image: np.ndarray, prediction: BaseDataElement, path: str, meta: dict[str, Any], score_threshold: float
    ) -> None:
        """The label and its score on the image."""
        from mmpretrain.visualization import UniversalVisualizer

        resize = 224 if min(image.shape[:2]) < 224 else None  # a label needs some room
        options = dict(draw_gt=False, out_file=path, classes=meta.get('classes'), resize=resize)
        UniversalVisualizer().visualize_cls(image, prediction, **options)

    def describe(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, score_threshold: float
    ) -> dict[str, Any]:
        """The label, its name and its score."""
        label = int(prediction.pred_label)
        return dict(label=label, name=name_of(label, classes), score=prediction.pred_score.max().item())

    def encode(
        self, prediction: BaseDataElement, classes: Sequence[str] | None, options: EncodeOptions
    ) -> dict[str, Any]:
        """The labels of the largest scores, the largest first."""
        scores, labels = prediction.pred_score.sort(descending=True, stable=True)
        best = list(zip(labels[: options.top_k].tolist(), scores[: options.top_k].tolist()))
        return dict(
            task='classification',
            labels=[dict(label=label, name=name_of(label, classes), score=score) for label, score in best],
        )

    def caption(self, described: Mapping[str, Any]) -> str:
        """Name and score."""
        return f'{described["name"]} ({described["score"]:.2f})'

    def score(self, prediction: BaseDataElement) -> Tensor:
        """The largest score."""
        return prediction.pred_score.max()


# The first that fits counts: a data sample may have fields of several.
KINDS: tuple[PredictionKind, ...] = (Depth(), Segmentation(), Instances(), Classification())


def kind_of(prediction: BaseDataElement) -> PredictionKind:
    """What a prediction is of.

    Args:
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.

    Raises:
        ValueError: It holds no prediction that is known.
    """
    for kind in KINDS:
        if kind.field in prediction:
            return kind
    raise ValueError(f'there is no known prediction in {type(prediction).__name__}: {list(prediction.keys())}')


def name_of(label: int, classes: Sequence[str] | None) -> str | int:
    """The name of a class, or its index where no name is known."""
    return classes[label] if classes is not None and label < len(classes) else label


def label_map(prediction: BaseDataElement) -> np.ndarray:
    """The class indices of a segmentation (H, W): uint8, or uint16 where an index is above 255."""
    labels = prediction.pred_sem_seg.data.squeeze(0).cpu().numpy()
    return labels.astype(np.uint8 if labels.max() < 256 else np.uint16)


def above(prediction: BaseDataElement, score_threshold: float) -> Any:
    """The predicted instances with a score of at least the threshold."""
    found = prediction.pred_instances
    return found[found.scores >= score_threshold]


def png(image: np.ndarray) -> str:
    """An image or map, uint8 or uint16, as base64 of a PNG."""
    return base64.b64encode(cv2.imencode('.png', image)[1].tobytes()).decode('ascii')


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) in COCO's compressed run-length encoding: ``size`` (height, width) and ``counts``."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=[int(side) for side in encoded['size']], counts=encoded['counts'].decode('ascii'))


def draw_prediction(
    image: np.ndarray,
    prediction: BaseDataElement,
    path: str | os.PathLike,
    meta: Mapping[str, Any] | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> None:
    """Draw what a model says of an image, by the visualizer of its library.

    Labels with their scores, boxes and masks, maps of classes over the image, or a depth map
    beside the image with a bar in metres. Images with a short side below 400 pixels are enlarged for boxes.

    Args:
        image: (H, W, 3), uint8, RGB.
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.
        path: Image file to write; its folder is made.
        meta: ``classes`` and ``palette``, where they are known.
        score_threshold: Instances of a smaller score are not drawn. Defaults to 0.3.

    Raises:
        ValueError: The data sample holds no prediction that is known.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kind_of(prediction).draw(image, prediction, str(path), dict(meta or {}), score_threshold)


def describe_prediction(
    prediction: BaseDataElement, classes: Sequence[str] | None = None, score_threshold: float = SCORE_THRESHOLD
) -> dict[str, Any]:
    """A prediction as plain data, which JSON can hold.

    Args:
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.
        classes: Names of the classes, where they are known.
        score_threshold: Instances of a smaller score are left out. Defaults to 0.3.

    Raises:
        ValueError: The data sample holds no prediction that is known.
    """
    return kind_of(prediction).describe(prediction, classes, score_threshold)


def encode_prediction(
    prediction: BaseDataElement,
    classes: Sequence[str] | None = None,
    score_threshold: float = SCORE_THRESHOLD,
    top_k: int = TOP_LABELS,
    maps: bool = True,
) -> dict[str, Any]:
    """All of a prediction as data that JSON can hold.

    Args:
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.
        classes: Names of the classes, where they are known.
        score_threshold: Instances of a smaller score are left out. Defaults to 0.3.
        top_k: Number of labels of a classification. Defaults to 5.
        maps: Whether masks and maps are included. Defaults to True.

    Returns:
        ``task``, and by task: ``labels``; ``instances`` with boxes (x1, y1, x2, y2) in pixels and masks as COCO's
        run-length encoding; ``area`` and a ``map`` of class indices as PNG; ``depth_m`` and a ``map`` of depths as PNG.

    Raises:
        ValueError: The data sample holds no prediction that is known.
    """
    return kind_of(prediction).encode(prediction, classes, EncodeOptions(score_threshold, top_k, maps))


def caption(described: Mapping[str, Any]) -> str:
    """A few words on what :func:`describe_prediction` gave.

    Raises:
        KeyError: It did not give that.
    """
    for kind in KINDS:
        if kind.key in described:
            return kind.caption(described)
    raise KeyError(f'a description has one of {", ".join(kind.key for kind in KINDS)}')


def write_maps(prediction: BaseDataElement, path: Path) -> list[Path]:
    """Write the maps of a prediction: class indices as PNG, depth in metres as .npy.

    Args:
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.
        path: What the names of the files begin with.

    Returns:
        The files.
    """
    return kind_of(prediction).write_maps(prediction, path)


def check_finite(content: Any) -> None:
    """Check that all numbers of a description are finite.

    Raises:
        ValueError: One is not.
    """
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            check_finite(part)
    elif isinstance(content, float) and not math.isfinite(content):
        raise ValueError('the prediction holds numbers that are not finite')
