"""Vision Mamba: models, training, data. `import vim.models_mamba` registers the models with timm."""
