"""Jobs on Cloud TPU slices: asked for, started, watched, made again when they are taken away, and cleaned up.

A job is a folder in a bucket (`rae_xla.cloud.job`). `rae_xla.cloud.queued` asks for slices, each machine runs
``start.sh`` and then `rae_xla.cloud.worker`, and `rae_xla.cloud.supervisor` watches from anywhere. They talk through
the folder alone, so each may end at any time and be started again. Where no recipe is read torch is not imported.
"""
