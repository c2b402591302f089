"""Semantic segmentation with MMSegmentation: `backbone` registers Vision Mamba there, `configs` trains with it."""
