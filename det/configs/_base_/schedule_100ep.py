"""184,375 updates of 64 images (100 epochs of COCO): warm-up over 250, a tenth at 163,889 and again at 177,546."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="VisionMambaLayerDecay",
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=184375, milestones=[163889, 177546], gamma=0.1),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=184375, val_interval=5000)
