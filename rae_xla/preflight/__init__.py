"""What a recipe costs on a Cloud TPU slice, known without one: its programs, compiled by the TPU's own compiler."""
