"""A small UPerNet on scenes of digits, 11 classes, minutes on two CPU cores.

    python tools/make_digit_scenes.py
    python seg/train.py seg/configs/upernet_vim_digits.py --cfg-options model.backbone.discretization_method=bilinear

The six methods reach a mean IoU of 0.62 to 0.63: documentation/segmentation_detection.md.
"""

_base_ = ["_base_/upernet.py", "_base_/runtime.py"]

data_root = "data/digit_scenes"
crop_size = (128, 128)
num_classes = 11
embed_dim = 64
channels = 64
classes = ("background", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
palette = [
    [40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
    [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212],
]  # fmt: skip
loss = dict(class_weight=[0.3] + [1.0] * 10)  # four pixels in five are background
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=128,
        patch_size=8,
        stride=8,
        embed_dim=embed_dim,
        depth=4,
        d_state=8,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        use_residual_as_feature=True,
        last_layer_process="add",
    ),
    decode_head=dict(in_channels=[embed_dim] * 4, channels=channels, num_classes=num_classes, loss_decode=loss),
    auxiliary_head=dict(in_channels=embed_dim, channels=channels, num_classes=num_classes, loss_decode=loss),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    img_suffix=".png",
    seg_map_suffix=".png",
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="VisionMambaLayerDecay",
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=5.0),
)
max_iters = 4000
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=250))
