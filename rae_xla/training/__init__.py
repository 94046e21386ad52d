"""Training: one loop, one update, and one file for each kind of model. Sees the `Runtime` protocol only."""
