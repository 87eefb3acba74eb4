import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from iconformer_mm.inference import draw_prediction
from iconformer_mm.inference.drawing import draw_boxes, draw_classes, draw_instances

PALETTE = [(200, 0, 0), (0, 200, 0)]


def test_classes_are_coloured():
    drawn = draw_classes(np.array([[0, 1], [255, 1]]), PALETTE)
    assert drawn.tolist() == [[[200, 0, 0], [0, 200, 0]], [[0, 0, 0], [0, 200, 0]]]


def test_boxes_are_outlined_in_the_colour_of_their_class():
    image = np.full((12, 16, 3), 90, np.uint8)
    drawn = draw_boxes(image, [[2.4, 1.0, 9.6, 8.0], [0.0, 0.0, 1.0, 1.0]], [1, 0], [(9, 9, 9), (200, 30, 60)])
    outline = np.zeros((12, 16), bool)
    outline[1, 2:11] = outline[8, 2:11] = outline[1:9, 2] = outline[1:9, 10] = True
    assert (drawn[outline] == (200, 30, 60)).all() and (drawn[:2, :2] == 9).all()
    outline[:2, :2] = True
    assert (drawn[~outline] == 70).all() and (image == 90).all()


def test_instances_are_drawn_over_the_image():
    image = np.full((20, 20, 3), 90, np.uint8)[..., ::-1]  # a view, as pipelines give it
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 5:15, 5:15] = True
    drawn = draw_instances(image, mask, [1], PALETTE)
    assert drawn[0, 0].tolist() == [70, 70, 70] and drawn[10, 10, 1] > 150 > drawn[10, 10, 0]
    assert drawn[5, 5].tolist() == [60, 255, 60]  # the outline
    assert np.array_equal(draw_instances(image, mask[:0], [], PALETTE), np.full((20, 20, 3), 70))
    assert (image == 90).all()


@pytest.mark.parametrize(('height', 'width', 'factor'), [(96, 128, 5), (400, 500, 1)])
def test_small_images_with_boxes_are_enlarged(height, width, factor, tmp_path):
    """The box and the mask are where they were, in units of the image; the data sample stays as it is."""
    DetDataSample = pytest.importorskip('mmdet.structures').DetDataSample

    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, 40:70, 50:90] = True
    boxes = torch.tensor([[50.0, 40.0, 90.0, 70.0]])
    instances = InstanceData(bboxes=boxes.clone(), labels=torch.tensor([0]), scores=torch.tensor([0.9]), masks=mask)
    sample = DetDataSample(pred_instances=instances)
    image = np.full((height, width, 3), 128, np.uint8)
    meta = dict(classes=('disc',), palette=[(255, 0, 0)])
    draw_prediction(image, sample, tmp_path / 'picture.png', meta)

    picture = cv2.imread(str(tmp_path / 'picture.png'))
    assert picture.shape == (height * factor, width * factor, 3)
    changed = np.any(picture != 128, axis=2)
    rows, columns = (np.flatnonzero(changed.any(axis=axis)) / factor for axis in (1, 0))
    line = 10 / factor
    assert abs(rows[0] - 40) <= line and abs(rows[-1] - 70) <= line + 1
    assert abs(columns[0] - 50) <= line and abs(columns[-1] - 90) <= line + 1
    assert torch.equal(sample.pred_instances.bboxes, boxes) and sample.pred_instances.masks.shape == mask.shape
