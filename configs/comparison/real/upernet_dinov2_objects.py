# A real DINOv2 ViT-S/14 with UPerNet on photographed objects in ADE20K's format, which `iconformer data` writes.
_base_ = ['../../scenes/real/upernet_dinov2-scenes_target.py']

classes = (
    'background',
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
    data_root='data/real/objects-semantic',
    metainfo=dict(classes=classes, palette=[[18 * i, 255 - 18 * i, (97 * i) % 256] for i in range(len(classes))]),
)
model = dict(decode_head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(
    dataset=dict(**dataset, data_prefix=dict(img_path='images/testing', seg_map_path='annotations/testing'))
)
test_dataloader = val_dataloader
