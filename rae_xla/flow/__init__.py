"""Flow matching as pure functions of explicit inputs, noise included (arXiv 2510.11690, section 4)."""
