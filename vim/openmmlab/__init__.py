"""What the adapters to MMSegmentation (seg/) and MMDetection (det/) share; it needs mmengine.

`backbone`: Vision Mamba as a backbone that gives feature maps. `pretrained`: weights of a classifier for it.
`layer_decay`: the optimizer's parameter groups. `runs`: what the command lines do with a configuration.
"""
