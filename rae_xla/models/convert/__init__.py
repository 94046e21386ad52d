"""Other people's checkpoint layouts to ours and back. The only home of their spellings.

``released``: the authors' state dicts. ``encoders``: timm and its Hugging Face ports. ``diffusers``: its
``AutoencoderRAE``. There and back is the identity, bit for bit, but for what a function's docstring says.
"""
