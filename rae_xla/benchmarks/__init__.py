"""The project's own measurements, each a function that returns its rows. ``tools/benchmark.py`` prints them."""
