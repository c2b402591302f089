"""60,000 updates: linear warm-up over 1,500, then down to 0 in a line."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="VisionMambaLayerDecay",
    paramwise_cfg=dict(layer_decay_rate=0.92),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=60000, val_interval=2000)
