import cv2
import numpy as np

from iconformer_mm.comparison.predictions import PredictionRow, draw_classes, draw_instances, plot_predictions

PALETTE = [(200, 0, 0), (0, 200, 0)]


def test_classes_are_coloured():
    drawn = draw_classes(np.array([[0, 1], [255, 1]]), PALETTE)
    assert drawn.tolist() == [[[200, 0, 0], [0, 200, 0]], [[0, 0, 0], [0, 200, 0]]]


def test_instances_are_drawn_over_the_image():
    image = np.full((20, 20, 3), 90, np.uint8)[..., ::-1]  # a view, as pipelines give it
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 5:15, 5:15] = True
    drawn = draw_instances(image, mask, [1], PALETTE)
    assert drawn[0, 0].tolist() == [70, 70, 70] and drawn[10, 10, 1] > 150 > drawn[10, 10, 0]
    assert drawn[5, 5].tolist() == [60, 255, 60]  # the outline
    assert np.array_equal(draw_instances(image, mask[:0], [], PALETTE), np.full((20, 20, 3), 70))
    assert (image == 90).all()


def test_a_picture_with_depth_and_colours(tmp_path):
    image = np.zeros((30, 40, 3), np.uint8)
    depth = np.tile(np.linspace(1, 9, 40), (30, 1))
    rows = [PredictionRow('semantic', image, [image + 100, image]), PredictionRow('depth', image, [depth, depth / 2])]
    plot_predictions(rows, ['ground truth', 'iCoN'], tmp_path / 'new' / 'p.png')
    picture = cv2.imread(str(tmp_path / 'new' / 'p.png'))
    assert picture.shape[1] > picture.shape[0] > 100
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # the colours of depth
