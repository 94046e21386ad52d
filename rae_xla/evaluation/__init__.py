"""Statistics, samples and scores. Sees the `Runtime` protocol only."""
