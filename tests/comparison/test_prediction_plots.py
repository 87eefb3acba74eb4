import cv2
import numpy as np

from iconformer_mm.comparison.prediction_plots import PredictionRow, plot_predictions


def test_a_picture_with_depth_and_colours(tmp_path):
    image = np.zeros((30, 40, 3), np.uint8)
    depth = np.tile(np.linspace(1, 9, 40), (30, 1))
    rows = [PredictionRow('semantic', image, [image + 100, image]), PredictionRow('depth', image, [depth, depth / 2])]
    plot_predictions(rows, ['ground truth', 'iCoN'], tmp_path / 'new' / 'p.png')
    picture = cv2.imread(str(tmp_path / 'new' / 'p.png'))
    assert picture.shape[1] > picture.shape[0] > 100
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # the colours of depth
