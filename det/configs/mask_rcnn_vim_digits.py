"""A small Mask R-CNN on scenes of digits, 10 classes, minutes on two CPU cores.

    python tools/make_digit_scenes.py
    python det/train.py det/configs/mask_rcnn_vim_digits.py --cfg-options model.backbone.discretization_method=bilinear

The six methods reach a box AP50 of 0.79 to 0.81: documentation/segmentation_detection.md.
"""

_base_ = ["_base_/mask_rcnn.py", "_base_/runtime.py"]

data_root = "data/digit_scenes"
classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
num_classes = 10
embed_dim = 64
channels = 64
strides = [4, 8, 16]
model = dict(
    backbone=dict(
        img_size=128,
        patch_size=8,
        stride=8,
        embed_dim=embed_dim,
        depth=4,
        d_state=8,
        drop_path_rate=0.0,
        if_rope=False,
        if_rope_residual=False,
    ),
    neck=dict(in_channels=embed_dim, out_channels=channels, scales=(2.0, 1.0, 0.5), num_outs=3),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        num_convs=1,
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=strides, finest_scale=14),
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=1,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels,
            fc_out_channels=128,
            num_classes=num_classes,
        ),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=strides, finest_scale=14),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=num_classes),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=24)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=f"{data_root}/annotations/instances_validation.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="VisionMambaLayerDecay",
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=10.0),
)
max_iters = 1500
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=250))
