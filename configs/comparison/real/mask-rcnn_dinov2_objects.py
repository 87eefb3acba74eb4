# A real DINOv2 ViT-S/14 with Mask R-CNN on photographed objects in COCO's format, which `iconformer data` writes.
_base_ = ['../../scenes/real/mask-rcnn_dinov2-scenes_target.py']

classes = (
    'bird',
    'coin',
    'fish',
    'flower',
    'fruit',
    'gravestone',
    'instrument',
    'invertebrate',
    'mammal',
    'tool',
    'vegetable',
    'vehicle',
)
dataset = dict(
    data_root='data/real/objects-instance/',
    metainfo=dict(classes=classes, palette=[(20 * i, 255 - 20 * i, (97 * i) % 256) for i in range(len(classes))]),
)
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_test2017.json',
        data_prefix=dict(img='test2017/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/real/objects-instance/annotations/instances_test2017.json')
test_evaluator = val_evaluator
