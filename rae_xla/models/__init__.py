"""Plain PyTorch models: they know no recipe, no device and no mesh, and import without torch_xla."""
