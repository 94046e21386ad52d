"""Image sources, transforms and the loader that puts them in order."""
