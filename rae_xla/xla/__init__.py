"""The XLA runtime. Nothing outside this package imports torch_xla or jax; `rae_xla.runtime.create` imports this."""
