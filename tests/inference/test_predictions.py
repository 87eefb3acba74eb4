"""Each kind of prediction, told by the fields of a data sample, with numbers known beforehand."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from iconformer_mm.inference.predictions import (
    Classification,
    Depth,
    Instances,
    Segmentation,
    caption,
    describe_prediction,
    kind_of,
    write_maps,
)

MAP = torch.tensor([[[0, 1, 1, 7]]])
SAMPLES = {
    Depth: BaseDataElement(pred_depth_map=PixelData(data=torch.tensor([[[1.0, 2.0, 4.0]]]))),
    Segmentation: BaseDataElement(
        pred_sem_seg=PixelData(data=MAP), seg_logits=PixelData(data=torch.stack([MAP[0].float(), -MAP[0].float()]))
    ),
    Instances: BaseDataElement(
        pred_instances=InstanceData(
            bboxes=torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]),
            labels=torch.tensor([1, 0]),
            scores=torch.tensor([0.75, 0.25]),
        )
    ),
    Classification: BaseDataElement(pred_label=torch.tensor([1]), pred_score=torch.tensor([0.25, 0.75])),
}
DESCRIBED = {
    Depth: dict(depth_m=dict(min=1.0, median=2.0, max=4.0)),
    Segmentation: dict(area={'sky': 0.25, 'tree': 0.5, '7': 0.25}),  # the last has no name
    Instances: dict(instances=[dict(name='tree', score=0.75, box=[0.0, 1.0, 2.0, 3.0])]),
    Classification: dict(label=1, name='tree', score=0.75),
}
CAPTIONS = {
    Depth: 'depth 1.00 to 4.00 m',
    Segmentation: 'tree 50%, sky 25%, 7 25%',
    Instances: '1 instances',
    Classification: 'tree (0.75)',
}
SCORES = {Depth: 7.0, Segmentation: 9 / 4, Instances: 1.0, Classification: 0.75}


@pytest.mark.parametrize('kind', SAMPLES)
def test_a_kind(kind):
    sample = SAMPLES[kind]
    assert type(kind_of(sample)) is kind
    described = describe_prediction(sample, ('sky', 'tree'))
    assert described == DESCRIBED[kind] and caption(described) == CAPTIONS[kind]
    assert float(kind_of(sample).score(sample)) == SCORES[kind]


def test_maps_are_written_as_they_are(tmp_path):
    (file,) = write_maps(SAMPLES[Depth], tmp_path / 'a')
    assert file.name == 'a_depth.npy' and np.load(file).tolist() == [1.0, 2.0, 4.0]
    (file,) = write_maps(SAMPLES[Segmentation], tmp_path / 'a')
    assert file.name == 'a_labels.png' and cv2.imread(str(file), cv2.IMREAD_UNCHANGED).tolist() == [[0, 1, 1, 7]]
    assert write_maps(SAMPLES[Classification], tmp_path / 'a') == []


def test_indices_above_255_are_written_as_they_are(tmp_path):
    """8 bits would turn class 300 into 44."""
    sample = BaseDataElement(pred_sem_seg=PixelData(data=torch.tensor([[[0, 255], [256, 300]]])))
    (file,) = write_maps(sample, tmp_path / 'a')
    assert cv2.imread(str(file), cv2.IMREAD_UNCHANGED).tolist() == [[0, 255], [256, 300]]


def test_what_is_no_prediction():
    with pytest.raises(ValueError, match=r"no known prediction in BaseDataElement: \['gt_label'\]"):
        kind_of(BaseDataElement(gt_label=torch.tensor(1)))
    with pytest.raises(KeyError, match='a description has one of depth_m, area, instances, label'):
        caption(dict(other=1))


def test_boxes_without_masks_beside_the_truth():
    """The truth may be wrapped, as MMDetection's data sets give it. Predictions of a small score are left out."""
    wrapper = pytest.importorskip('mmdet.structures.bbox').HorizontalBoxes
    boxes = torch.tensor([[2.0, 3.0, 9.0, 8.0], [1.0, 1.0, 12.0, 10.0]])
    truth = InstanceData(bboxes=wrapper(boxes[:1]), labels=torch.tensor([1]))
    found = InstanceData(bboxes=boxes, labels=torch.tensor([1, 0]), scores=torch.tensor([0.9, 0.1]))
    sample = BaseDataElement(pred_instances=found, gt_instances=truth)
    image, palette = np.zeros((12, 16, 3), np.uint8), [(0, 200, 0), (200, 0, 0)]
    drawn = kind_of(sample).picture(sample, image, palette, 'gt')
    assert (drawn[3, 2:10] == (200, 0, 0)).all()
    assert np.array_equal(drawn, kind_of(sample).picture(sample, image, palette))
    assert not np.array_equal(drawn, kind_of(sample).picture(sample, image, palette, score_threshold=0.05))
